"""sora_train.evaluate: a model that obeys scores 1, one that ignores its prompts scores chance, the control tells."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from sora_train import evaluate as evaluate_module
from sora_train.config.data import DataConfig
from sora_train.config.encoders import CodecConfig
from sora_train.config.model import ModelConfig
from sora_train.config.root import ConfigError, TrainConfig
from sora_train.config.world import Level
from sora_train.data.video_file import save_video
from sora_train.encoders.codec_shape import CodecShape
from sora_train.evaluate import CHANCE, grid, may_judge, scorer_on_truth, shares, shuffled_shares, summary
from sora_train.generation import check_sizes
from sora_train.world.render import render
from sora_train.world.sampling import SIMPLE_SIZES, sample_scene
from sora_train.world.scene import truth
from sora_train.world.score import Reading
from sora_train.world.words import HELD_OUT, TRIPLES, parse_prompt


def obeying(cases):
    return [Reading(case.color, case.shape, case.motion) for case in cases]


def test_the_grid_asks_for_everything_at_mixed_sizes():
    cases = grid(60, 9, seed=3)
    assert {(case.color, case.shape, case.motion) for case in cases} == set(TRIPLES)
    assert Counter((case.height, case.width) for case in cases) == dict.fromkeys(SIMPLE_SIZES, 10)
    assert sum(case.held_out for case in cases) == len(HELD_OUT) == 10
    assert len({case.seed for case in cases}) == 60
    assert all(parse_prompt(case.prompt) == (case.color, case.shape, case.motion) for case in cases)
    assert max(Counter((c.color, c.shape, c.motion) for c in grid(120, 9, 0)).values()) == 2


def test_obeying_scores_one_and_near_chance_against_other_prompts():
    cases = grid(60, 9, 0)
    results = summary(cases, obeying(cases))
    for part in (results, results["trained"], results["held_out"]):
        assert [part[name] for name in ("color", "shape", "motion", "all")] == [1, 1, 1, 1]
    assert (results["prompts"], results["trained"]["prompts"], results["held_out"]["prompts"]) == (60, 50, 10)
    for name, chance in CHANCE.items():
        assert results["shuffled"][name] == pytest.approx(chance, abs=0.02)


def test_ignoring_the_prompt_scores_the_same_as_its_control():
    cases = grid(60, 9, 0)
    readings = [Reading("red", "circle", None)] * 60
    assert shares(cases, readings) == pytest.approx({"color": 1 / 4, "shape": 1 / 3, "motion": 0, "all": 0})
    assert shuffled_shares(cases, readings) == pytest.approx({"color": 1 / 4, "shape": 1 / 3, "motion": 0})


def test_shuffled_shares_are_the_mean_over_other_prompts():
    cases = grid(60, 9, 0)[:3]
    readings = [Reading(cases[1].color, cases[0].shape, None)] * 3
    by_hand = [(i, j) for i in range(3) for j in range(3) if i != j]
    for name in ("color", "shape"):
        matches = sum(getattr(cases[j], name) == getattr(readings[i], name) for i, j in by_hand)
        assert shuffled_shares(cases, readings)[name] == pytest.approx(matches / 6)


def test_held_out_failures_show_in_their_own_row():
    cases = grid(60, 9, 0)
    readings = [
        Reading(None, None, None) if case.held_out else r for case, r in zip(cases, obeying(cases), strict=True)
    ]
    results = summary(cases, readings)
    assert results["held_out"]["color"] == 0
    assert results["trained"]["color"] == 1
    assert results["color"] == pytest.approx(50 / 60)


@pytest.fixture
def rendered(tmp_path) -> Path:
    """A small corpus with its truth, as data_pipelines.world writes it."""
    folder = tmp_path / "videos"
    (folder / "truth").mkdir(parents=True)
    for index in range(20):
        scene = sample_scene(1, index, Level.simple)
        save_video(render(scene), folder / f"clip-{index}.mp4", scene.fps)
        (folder / "truth" / f"clip-{index}.json").write_text(json.dumps(truth(scene)))
    return folder


def test_the_scorer_is_held_to_the_truth(rendered):
    on_truth = scorer_on_truth(rendered, 500)
    assert on_truth["clips"] == 20
    may_judge(on_truth)
    path = rendered / "truth" / "clip-0.json"
    values = json.loads(path.read_text())
    values["objects"][0]["color"] = {"red": "blue"}.get(values["objects"][0]["color"], "red")
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"reads color right in 0\.950"):
        may_judge(scorer_on_truth(rendered, 500))


def test_no_truth_is_said_so(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no truth/\*\.json"):
        scorer_on_truth(tmp_path, 5)


def scene_for(request):
    """A rendered clip that shows what the prompt says, at its size where one turns up."""
    found = None
    for index in range(100_000):
        scene = sample_scene(7, index, Level.simple)
        (figure,) = scene.shots[0].figures
        if scene.num_frames > 1 and (figure.color, figure.shape, figure.motion) == parse_prompt(request.prompt):
            found = scene
            break
    assert found is not None
    return render(found)


def test_the_command_scores_what_was_generated(rendered, monkeypatch, tmp_path):
    """In place of the model, a renderer that obeys: the whole way from prompts over pixels to scores gives 1."""
    config = TrainConfig(
        data=DataConfig(shards="/d"), codec=CodecConfig(), model=ModelConfig(in_channels=96, out_channels=96)
    )
    run = SimpleNamespace(
        config=config,
        model=None,
        check=lambda requests: check_sizes(requests, config.model, CodecShape(96, 2, 4)),
        step=5,
        num_parameters=11,
        generate=lambda requests, sampling: [scene_for(request) for request in requests],
    )
    monkeypatch.setattr(evaluate_module, "open_run", lambda run_dir, device: run)
    app = typer.Typer()
    app.command()(evaluate_module.evaluate)
    output = tmp_path / "out"
    arguments = ["run", "--output", str(output), "--truth", str(rendered), "--prompts", "12"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    values = json.loads((output / "evaluation.json").read_text())
    assert (values["prompts"], values["step"], values["parameters"]) == (12, 5, 11)
    assert [values[name] for name in ("color", "shape", "motion")] == [1, 1, 1]
    assert set(values["scorer_on_truth"]) == {"color", "shape", "motion", "clips"}
    assert len(values["samples"]) == 12
    assert all((output / sample["file"]).is_file() for sample in values["samples"])
    result = CliRunner().invoke(app, [*arguments, "--frames", "4"])
    assert result.exit_code == 2
    assert "frames=4 is not 1 plus a multiple of 2" in result.output
