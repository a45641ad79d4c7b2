"""What everything that reads models from the Hugging Face hub shares.

Its libraries are imported where they are used: that takes seconds.
"""

import hashlib
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

from carrara.errors import full_disk

EXPORTED = "transformers"
"""The folder in a component in which a part lies in the layout of `transformers`, too."""

_log = logging.getLogger(__name__)


class NotFetched(Exception):
    """Why a model is not here, in words that follow its name."""


def quieten() -> None:
    """Advice and progress bars are for those who call these libraries by hand."""
    import huggingface_hub.utils
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()
    for name in ("transformers", "huggingface_hub"):
        warnings.filterwarnings("ignore", module=name)


def fetch(name: str, patterns: Sequence[str]) -> Path:
    """The folder of a hub's model in its cache; what is missing there of `patterns` is downloaded.

    Raises:
        NotFetched: there is no such model, it may not be read, or it is not here and cannot be fetched.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError

    weights = [pattern for pattern in patterns if pattern.endswith(".safetensors") and "*" not in pattern]
    try:
        if weights and not any(isinstance(try_to_load_from_cache(name, file), str) for file in weights):
            _log.info("looking for %s on the Hugging Face hub", name)
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except GatedRepoError:
        problem = "the hub wants to know who reads it: accept its terms there and log in with `hf auth login`"
    except (RepositoryNotFoundError, HFValidationError):
        problem = "there is no such folder, and the hub has no such model: name one of them"
    except (OSError, HTTPError) as error:  # of a proxy, say, or of a connection that broke
        if isinstance(error, OSError) and (full_disk(error) is not None or isinstance(error, PermissionError)):
            raise
        problem = (
            "there is no such folder, and the hub's model is not on this machine and cannot be fetched: download it "
            f"once with `hf download {name}`, or name a local folder"
        )
    raise NotFetched(problem)


def sha256_of(files: Sequence[Path]) -> str:
    """Of one file as the hub and `sha256sum` show it; of several over their digests in hexadecimal."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
