"""Weights from the Hugging Face hub, for repositories that a user names."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from training.errors import TrainingError

SCHEME = "hf-hub:"


def fetch(source: str | Path, filename: str, *, endpoint: str | None = None) -> Path:
    """The local file of `source`: a path, or `hf-hub:OWNER/REPOSITORY[/FILE]` downloaded into a cache.

    The download uses the token in `HF_TOKEN` (or of the hub's login), and `filename` where `source` names no
    file. Raises a `TrainingError` that names the licence page where access is missing.
    """
    name = str(source)
    if not name.startswith(SCHEME):
        return Path(source)
    parts = name.removeprefix(SCHEME).split("/")
    if len(parts) < 2 or not all(parts):
        raise TrainingError(
            f"{name} names no repository; write {SCHEME}OWNER/REPOSITORY or {SCHEME}OWNER/REPOSITORY/FILE"
        )
    repository = "/".join(parts[:2])
    filename = "/".join(parts[2:]) or filename
    page = f"huggingface.co/{repository}"
    try:
        return Path(hf_hub_download(repository, filename, endpoint=endpoint))
    except (GatedRepoError, RepositoryNotFoundError) as error:
        token = "the token in HF_TOKEN has no access" if get_token() else "HF_TOKEN is not set"
        raise TrainingError(
            f"{filename} can't be had from {page}: {token}; accept the licence on that page "
            "and set HF_TOKEN to a token of the same account"
        ) from error
    except LocalEntryNotFoundError as error:
        raise TrainingError(
            f"{page} can't be reached, and {filename} isn't in the cache; give a local file"
        ) from error
    except EntryNotFoundError as error:
        raise TrainingError(
            f"{page} has no file {filename}; name one as {SCHEME}{repository}/FILE"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise TrainingError(f"{filename} can't be had from {page}: {str(error).splitlines()[0]}") from error
