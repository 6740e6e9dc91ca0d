"""Downloads from the model hub, with a short timeout and short error messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loramill.errors import BaseUnusable

#: Timeout of a request to the hub.
_TIMEOUT_SECONDS = 5.0


def cached_snapshot(repo: str, files: Sequence[str]) -> Path | None:
    """The folder of a model's files that match these patterns, from an earlier download; None if there is none."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=[*files], local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None


def download_snapshot(repo: str, files: Sequence[str]) -> Path:
    """Downloads the files of a model that match these patterns and have changed; returns their folder.

    Raises:
        BaseUnusable: the model does not exist, or no hub can be reached.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _translate_errors(repo):
        # The download tries five times over 25 s, with a warning for each; this request fails at once.
        HfApi().model_info(repo, timeout=_TIMEOUT_SECONDS)
        return Path(snapshot_download(repo, allow_patterns=[*files], etag_timeout=_TIMEOUT_SECONDS))


@contextmanager
def _translate_errors(repo: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except (errors.RepositoryNotFoundError, errors.GatedRepoError, errors.HFValidationError) as error:
        raise BaseUnusable(
            f"'{repo}' is not a folder on this machine, and the hub has no such model that you may read: correct the "
            "name, or log in with `hf auth login`."
        ) from error
    except (_http_error(), errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason = str(error).partition("\n")[0]
        raise BaseUnusable(
            f"'{repo}' is not a folder on this machine, and no model hub could be reached to download it ({reason}): "
            "give a local Hugging Face folder, or try again with a network."
        ) from error


def _http_error() -> type[Exception]:
    """The base class of errors of the HTTP library of the installed hub client, which has changed over time."""
    from huggingface_hub import errors

    return next(kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
