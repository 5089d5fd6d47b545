"""Says whether what this project calls of timm still takes the arguments that it gives.

    python scripts/signatures.py

For timm's newest release, beside the contract tests: exits with 1 and names what moved.
"""

import importlib
import inspect
import sys
from typing import Any

import timm

# Functions of timm and the arguments that are given to them by name, or in these first places.
CALLS = {
    "timm.create_model": ("model_name", "pretrained", "pretrained_cfg_overlay", "exportable"),
    "timm.models.build_model_with_cfg": ("model_cls", "variant", "pretrained", "pretrained_filter_fn", "feature_cfg"),
    "timm.models.resolve_pretrained_cfg": ("variant", "pretrained_cfg", "pretrained_cfg_overlay"),
    "timm.models.save_for_hf": ("model", "save_directory", "model_args", "safe_serialization"),
    "timm.models.convnext.ConvNeXt": ("kernel_sizes", "device", "dtype", "depths", "dims", "conv_mlp", "use_grn"),
    "timm.models.convnext.checkpoint_filter_fn": ("state_dict", "model"),
    "timm.optim.param_groups_weight_decay": ("model", "weight_decay", "no_weight_decay_list"),
    "timm.optim.param_groups_layer_decay": ("model", "weight_decay", "no_weight_decay_list", "layer_decay"),
    "timm.optim.create_optimizer_v2": ("model_or_params", "opt", "lr", "weight_decay"),
    "timm.scheduler.create_scheduler_v2": ("optimizer", "num_epochs", "warmup_epochs", "warmup_lr", "min_lr"),
    "timm.utils.freeze": ("root_module", "submodules", "include_bn_running_stats"),
    "timm.utils.ModelEmaV3": ("model", "decay", "use_warmup"),
    "timm.utils.reparameterize_model": ("model", "inplace"),
    "timm.data.create_transform": ("input_size", "is_training", "no_aug", "scale", "hflip", "auto_augment", "re_prob"),
}
# Methods and attributes of timm's block and model that ours read.
NAMES = {
    "timm.models.convnext.ConvNeXtBlock": {"conv_dw", "norm", "mlp", "gamma", "shortcut", "drop_path", "use_conv_mlp"},
    "timm.models.convnext.ConvNeXt": {"stem", "stages", "head", "feature_info", "num_classes"},
}


def find(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def main() -> int:
    problems = []
    for path, arguments in CALLS.items():
        try:
            parameters = inspect.signature(find(path)).parameters  # type: ignore[arg-type]
        except (AttributeError, ImportError) as error:
            problems.append(f"{path} is gone: {error}")
            continue
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        missing = [name for name in arguments if name not in parameters and not takes_any]
        if missing:
            problems.append(f"{path} no longer takes {', '.join(missing)}; it takes {', '.join(parameters)}")
    model: Any = timm.create_model("convnext_atto", device="meta")
    objects = {"ConvNeXtBlock": model.stages[0].blocks[0], "ConvNeXt": model}
    for path, names in NAMES.items():
        missing = sorted(name for name in names if not hasattr(objects[path.rpartition(".")[2]], name))
        if missing:
            problems.append(f"{path} no longer has {', '.join(missing)}")
    print(f"timm {timm.__version__}: " + ("nothing moved" if not problems else "\n  ".join(["", *problems])))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
