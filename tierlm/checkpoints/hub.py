"""From a model's name to its files: a path, "demo", or an id of the Hugging Face Hub. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tierlm.checkpoints.arriving import fetch_all, fetch_headers
from tierlm.checkpoints.checkpoint import read_json
from tierlm.checkpoints.foreign import refuse_foreign
from tierlm.checkpoints.gguf_header import gguf_in
from tierlm.checkpoints.staging import HubFile, discard, stage, staged_in
from tierlm.errors import CheckpointError, ModelNotFoundError, TierlmError, UsageError
from tierlm.files import is_file, is_folder

DEMO = Path(__file__).parent.parent / "demo"
ID = re.compile(r"(?:hf\.co/|https://huggingface\.co/)?(\w[\w.-]*/[\w.-]+)(?:@(\w[\w./-]*))?(?::([^:]+))?")
SMALL = ("*.json", "*.jinja", "tokenizer*", "tiktoken*")  # patterns of the files beside the weights
INDEX = "model.safetensors.index.json"
UNREACHED = "the Hub cannot be reached, or HF_HUB_OFFLINE is set: run once online"
LATER_PART = re.compile(r".*-(?!00001)\d{5}-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class HubId:
    """``ORGANISATION/NAME@REVISION:FILES``. ``files``: what tells one GGUF model of a repository from the others, such
    as Q4_K_M, or the name of its file."""

    repo: str
    revision: str | None = None
    files: str | None = None

    @classmethod
    def parse(cls, model: str) -> HubId | None:
        """None if ``model`` is no id."""
        match = ID.fullmatch(model)
        return None if match is None else cls(match[1], match[2], match[3])

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.repo + revision + (f":{self.files}" if self.files else "")


def find_model(model: str | Path, *, whole: bool = True) -> Path:
    """The path of ``model``: a folder, a GGUF file, "demo" (embedded) or a Hub id (downloaded).

    ``whole``: wait for the weights of a Hub id. Otherwise the path may be one whose weights still arrive
    (staging.py). Raises CheckpointError, UsageError.
    """
    if model == "demo":
        return DEMO
    folder = Path(model)
    if (file := gguf_in(folder)) is not None:
        return file
    refuse_foreign(folder)
    if is_folder(folder):
        return folder
    if is_file(folder):
        raise CheckpointError(f"{folder}: expected a folder in Hugging Face layout or a GGUF file, found another file")
    if (found := HubId.parse(str(model))) is None:
        raise ModelNotFoundError(f"{folder}: no such folder; give a folder in Hugging Face layout, a hub id, or 'demo'")
    with hub_errors(found):
        return _download(found, whole)


def find_hub_config(found: HubId) -> Path:
    """The ``config.json`` of a Hub id, downloaded alone; or a GGUF file of which only the header is there.
    Raises CheckpointError, UsageError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with hub_errors(found):
        if found.files is None:
            with suppress(EntryNotFoundError):
                return Path(hf_hub_download(found.repo, "config.json", revision=found.revision))
        return _download(found, whole=False)


@contextmanager
def hub_errors(found: HubId) -> Iterator[None]:
    """Errors of the library as CheckpointError."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except TierlmError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(f"{found}: no such folder, and not available on the Hub: {error}") from error


def _download(found: HubId, whole: bool) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, rarely needed

    remote = _listing(found)
    small = [*SMALL] if found.files is None else ["*.json"]  # a GGUF file has its own tokenizer
    folder = Path(
        snapshot_download(found.repo, revision=found.revision, allow_patterns=small, local_files_only=remote is None)
    )
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    try:
        weights = _weights(found, names if remote is None else remote, folder)
    except UsageError as error:
        if remote is None:
            raise CheckpointError(f"{error}, in the cache ({folder}); {UNREACHED}") from error
        raise
    missing = [name for name in weights if not (folder / name).exists()]
    if missing and remote is None:
        raise CheckpointError(
            f"{found}: {len(missing)} of {len(weights)} files of weights are not in the cache ({folder / missing[0]}); "
            f"{UNREACHED}"
        )
    if remote is not None and (absent := [name for name in weights if name not in remote]):
        raise CheckpointError(f"{found}: {INDEX} names {absent[0]}, which is not in the repository")
    if not missing:
        discard(folder, weights)
    elif remote is not None and not whole:
        staged = stage(found.repo, folder, {name: remote[name] for name in weights})
        fetch_headers(staged)
        return staged / Path(weights[0]).name if weights[0].endswith(".gguf") else staged
    elif (begun := staged_in(folder, weights)) is not None:
        fetch_all(begun)
    else:
        snapshot_download(found.repo, revision=folder.name, allow_patterns=weights)
    return folder / weights[0] if weights[0].endswith(".gguf") else folder


def _listing(found: HubId) -> Mapping[str, HubFile] | None:
    """The files of the repository; None if the Hub cannot be reached."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        info = HfApi().model_info(found.repo, revision=found.revision, files_metadata=True)
    except (HfHubHTTPError, ValueError):
        raise
    except Exception:  # of the library's HTTP client, which depends on its version: no connection
        return None
    files = {}
    for file in info.siblings or ():
        etag = (file.blob_id if file.lfs is None else file.lfs.sha256) or ""
        if ".." not in Path(file.rfilename).parts and re.fullmatch("[0-9a-f]{40,64}", etag):
            files[file.rfilename] = HubFile(file.size or 0, etag)
    return files


def _weights(found: HubId, names: Collection[str], folder: Path) -> list[str]:
    """The files of the weights, in order. ``folder``: with the index, if there is one."""
    if found.files is None:
        if INDEX in names:
            shards = read_json(folder / INDEX).get("weight_map")
            if isinstance(shards, dict):
                return sorted({shard for shard in shards.values() if isinstance(shard, str)})
        if "model.safetensors" in names:
            return ["model.safetensors"]
        if top := sorted(name for name in names if name.endswith(".safetensors") and "/" not in name):
            return top
    models = sorted(name for name in names if name.endswith(".gguf") and not Path(name).name.startswith("mmproj"))
    first = [name for name in models if not LATER_PART.fullmatch(name)]
    if found.files is not None:
        exact = [name for name in first if found.files in (name, Path(name).name)]
        word = re.compile(rf"(?<![a-z0-9]){re.escape(found.files)}(?![a-z0-9_])", re.IGNORECASE)
        first = exact or [name for name in first if word.search(Path(name).name)]
    if len(first) != 1:
        choice = f"; give one of {', '.join(map(repr, (first or models)[:20]))} after a colon" if models else ""
        wanted = "safetensors or one GGUF model" if found.files is None else f"one GGUF model that is {found.files!r}"
        raise UsageError(f"{found}: expected {wanted}, found {len(first)}{choice}")
    parts = re.compile(re.escape(first[0].removesuffix(".gguf")).replace(r"\-00001\-of", r"\-\d{5}\-of") + r"\.gguf")
    return [name for name in models if parts.fullmatch(name)]
