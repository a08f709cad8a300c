"""What decides a base's results, as fingerprints: the cache's keys are made of them.

A change of weights, settings, or tokenizer is another fingerprint. Where the base lies, and which
version of a library wrote its files, is not part of it: a moved folder is the same base.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tunekit import quantize
from tunekit.data.cache import content_key, fingerprint

if TYPE_CHECKING:
    from torch import nn

    from tunekit.families import Family

_INCIDENTAL = frozenset({"_name_or_path", "_diffusers_version", "transformers_version"})


def of_pictures(family: Family) -> str:
    """Return the sha256 (hex) of what decides a picture's latents."""
    return fingerprint(family.vae.state_dict(), family.name, settings(family.vae))


def of_words(family: Family) -> str:
    """Return the sha256 (hex) of what decides a prompt's conditioning."""
    encoders = family.text_encoders
    weights = {
        f"{name}.{key}": tensor
        for name, encoder in encoders.items()
        for key, tensor in encoder.state_dict().items()
    }
    configs = map(settings, encoders.values())
    return fingerprint(weights, family.name, family.tokenization(), *configs)


def of_drawing(family: Family) -> str:
    """Return the sha256 (hex) of everything that decides what the base draws by itself."""
    denoiser = family.denoiser
    scheduler = family.pipeline().scheduler
    return content_key(
        pictures=of_pictures(family),
        words=of_words(family),
        denoiser=fingerprint(quantize.state(denoiser), settings(denoiser)),
        scheduler=[type(scheduler).__name__, settings(scheduler)],
        dtype=str(family.dtype),
    )


def settings(module: nn.Module | Any) -> str:
    """Return a component's configuration as text, without what does not change its results."""
    config: Any = module.config
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kept = {key: value for key, value in values.items() if key not in _INCIDENTAL}
    return json.dumps(kept, sort_keys=True, default=str)
