"""T5 and UMT5 from tiny random folders with a tokenizer of a few words."""

import pytest
import torch

from sora_train.config.encoders import TextEncoderConfig
from sora_train.config.root import ConfigError
from sora_train.encoders.text_encoder import load_text_encoder

transformers = pytest.importorskip("transformers")


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "moves", "left"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(params=["T5", "UMT5"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=16, d_model=12, d_kv=6, d_ff=16, num_layers=2, num_heads=2
    )
    getattr(transformers, f"{request.param}EncoderModel")(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path


def load(folder, **settings):
    return load_text_encoder(TextEncoderConfig(path=str(folder), **settings), 12, "cpu", torch.float32)


def test_rows_stop_with_the_text_and_do_not_depend_on_company(folder):
    encoder = load(folder, max_tokens=6)
    assert encoder.width == 12
    rows = encoder.encode(["a red  circle\n", "", "a blue circle moves left and on and on"])
    assert [tuple(r.shape) for r in rows] == [(4, 12), (1, 12), (6, 12)]
    torch.testing.assert_close(rows[0], encoder.encode(["a red circle"])[0])
    assert (rows[0] - encoder.encode(["a blue circle"])[0]).abs().max() > 1e-3


def test_padding_as_wan_wants_it(folder):
    plain, padded = (load(folder, max_tokens=8, pad_to_max=pad).encode(["a red circle", ""]) for pad in (False, True))
    for short, full in zip(plain, padded, strict=True):
        assert full.shape == (8, 12)
        assert torch.equal(full[: short.shape[0]], short)
        assert full[short.shape[0] :].abs().max() == 0


@pytest.mark.parametrize("captions", [["a red circle", ""], ["a red circle", "a blue circle"]])
def test_nothing_is_asked_of_the_device(folder, captions):
    """Which is none here: tensors without numbers, that cannot be read back."""
    encoder = load(folder, max_tokens=8)
    shapes = [rows.shape for rows in encoder.encode(captions)]
    encoder.model.to("meta")
    rows = encoder.encode(captions)
    assert {each.device.type for each in rows} == {"meta"}
    assert [each.shape for each in rows] == shapes


def test_rows_are_those_that_the_tokenizers_mask_gives(folder):
    encoder = load(folder, max_tokens=8)
    captions = ["a red circle", "", "a blue circle moves left"]
    batch = encoder.tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = encoder.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    for rows, expected, mask in zip(encoder.encode(captions), hidden, batch.attention_mask, strict=True):
        assert torch.equal(rows, expected[mask == 1])


def test_a_pipeline_folder_is_found(folder, tmp_path_factory):
    pipeline = tmp_path_factory.mktemp("pipeline")
    (pipeline / "text_encoder").symlink_to(folder)
    (pipeline / "tokenizer").symlink_to(folder)
    torch.testing.assert_close(load(pipeline).encode(["a red"])[0], load(folder).encode(["a red"])[0])


def test_it_is_frozen(folder):
    encoder = load(folder)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert not encoder.encode(["a red"])[0].requires_grad


def test_rows_of_another_width_than_the_model_takes_are_refused(folder):
    with pytest.raises(ConfigError, match=r"model\.text\.width=128, but .* set model\.text\.width=12$"):
        load_text_encoder(TextEncoderConfig(path=str(folder)), 128, "cpu", torch.float32)


def test_bad_paths_get_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"text_encoder\.path is not set"):
        load("")
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        load(tmp_path)
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a bert"):
        load(tmp_path)


def test_its_identity_follows_weights_and_settings(folder):
    identity = load(folder, max_tokens=8).identity
    assert load(folder, max_tokens=8).identity == identity
    assert load(folder, max_tokens=9).identity != identity
    changed = load(folder, max_tokens=8)
    next(changed.model.parameters()).data.flatten()[0] += 1
    assert changed.identity != identity
