"""What everything that uses `transformers` shares. It is imported where it is used: that takes seconds."""

import warnings

EXPORTED = "transformers"
"""The folder in a component in which a part lies in the layout of `transformers`, too."""


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
