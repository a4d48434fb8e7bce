"""Load a causal language model and make its prefill sparse in one call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spas_attn.prefill import SparseConfig
from spas_attn.selectors import Selector

from .patching import patch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel


def load_model(
    name: str | Path,
    config: SparseConfig | Selector | Sequence[Selector] | str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    **options: Any,
) -> tuple[PreTrainedModel, Any]:
    """Load any causal language model of transformers, and patch it with a prefill method at its own thresholds.

    Prompts run sparse at once, without a calibration; single new tokens run dense.

    Args:
        name: a folder, a ``.gguf`` file, or a name on the hub.
        config: a :class:`~spas_attn.prefill.SparseConfig` or the path of its JSON file, a selector, or one selector per
            layer (a published table). None: the configuration that the package ships.
        device: where the model goes: the GPU if there is one, else the CPU, by default. Left out with ``device_map``.
        dtype: a torch dtype or its name; "auto" is the checkpoint's own (bfloat16 of a .gguf file), float32 on a CPU.
        options: further arguments of ``from_pretrained``: device_map, quantization_config, revision, trust_remote_code
            and so on.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        ValueError: on a configuration that cannot be read, and models that cannot be patched.
        TypeError: when ``config`` is something else.
        OSError: of transformers, where there is no such model.
    """
    selector = _selector(config)  # before anything is loaded
    if isinstance(name, SparseConfig) or not isinstance(name, (str, Path)):
        raise TypeError(f"name must be a folder, a .gguf file or a name on the hub, got {type(name).__name__}")
    if device is not None and "device_map" in options:
        raise ValueError(f"device and device_map exclude each other, got {device!r} and {options['device_map']!r}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype == "auto" and where.type == "cpu" and "device_map" not in options:
        dtype = torch.float32  # half precision is slow there
    model, tokenizer = read(name, dtype=dtype, **options)
    if "device_map" not in options and not getattr(model, "is_quantized", False):
        model = model.to(where)
    return patch(model.eval(), selector=selector, calibrated=False), tokenizer


def read(name: str | Path, **options: Any) -> tuple[PreTrainedModel, Any]:
    """The model and the tokenizer of a name, as transformers' ``from_pretrained`` gives them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(name)
    source = str(path.parent) if path.suffix == ".gguf" else str(name)
    shared = {key: options[key] for key in ("revision", "trust_remote_code", "token") if key in options}
    file = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    tokenizer = AutoTokenizer.from_pretrained(source, **shared, **file)
    if file:
        options = _unpacked() | options
        if options.get("dtype") == "auto":  # transformers would unpack to float32, which is slow on a GPU
            options["dtype"] = torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(source, **options, **file), tokenizer


def _unpacked() -> dict[str, Any]:
    """Unpack the weights of a .gguf file; some versions of transformers keep them packed, which is slow."""
    try:
        from transformers import GgufConfig
    except ImportError:  # a version that always unpacks them
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _selector(config: Any) -> Any:
    """The selector, or the selectors of the layers, that a configuration stands for."""
    if isinstance(config, Selector):
        return config
    if isinstance(config, (list, tuple)) and config and all(isinstance(part, Selector) for part in config):
        return list(config)
    if config is None or isinstance(config, (str, Path)):
        config = SparseConfig.from_json(config)
    if not isinstance(config, SparseConfig):
        raise TypeError(
            "config must be a SparseConfig, the path of its JSON file, a selector, one selector per layer, or None, "
            f"got {type(config).__name__}"
        )
    return config.selector()
