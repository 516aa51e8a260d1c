"""Indexes an existing folder of WebDataset tars: `python -m data_pipelines.index shards=DIR`.

What curation does for its own shards, for shards made elsewhere: afterwards `data.shards=DIR` trains on them.
"""

from pathlib import Path

from sora_train.config.command import hydra_app
from sora_train.config.curation import IndexConfig
from sora_train.config.root import ConfigError
from sora_train.data.index import write_index


@hydra_app(IndexConfig, "index")
def main(config: IndexConfig) -> None:
    """Writes dataset.json and one index a shard, and says what they hold."""
    folder = Path(config.shards)
    if not folder.is_dir():
        raise ConfigError(f"shards={config.shards} is not a folder: give the folder that holds the tars")
    manifest = write_index(folder)
    print(f"{folder / 'dataset.json'}: {manifest.num_samples} samples in {len(manifest.shards)} shards")


if __name__ == "__main__":
    main()
