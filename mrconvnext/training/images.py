"""A run on images."""

from typing import Any

from torch import nn

from .datasets import Data, open_data
from .loaders import Loaders, make_loaders
from .model import check_model, data_config, make_model
from .recipes import settle
from .run import Run


class ImageRun(Run):
    """A model of timm in training on images."""

    things = "images"

    def open_data(self) -> Data:
        """See `Run`; the arguments that nobody gave follow the images."""
        check_model(self.args)
        data = open_data(self.args)
        settle(self.args, data)
        self.class_names = data.names
        return data

    def make_model(self, data: Data) -> nn.Module:
        """See `Run`."""
        return make_model(self.args, data.classes)

    def make_loaders(self, data: Data) -> Loaders:
        """See `Run`; images come as the model takes them."""
        self.data_config: dict[str, Any] = data_config(self.model, self.args)
        return make_loaders(data, self.args, self.data_config, self.processes)

    def describe(self) -> str:
        """See `Run`."""
        args, names = self.args, self.class_names or []
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        started = getattr(self.model, "started_from", None)
        some = f": {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else ""
        size = " x ".join(str(side) for side in self.data_config["input_size"][1:])
        return "\n".join(
            [
                f"model {args.model}, {parameters / 1e6:.2f}M parameters, {self.model.num_classes} classes{some}"
                f"{f'; started from {started}' if started else ''}",
                f"images {self.counts[0]} to train, {self.counts[1]} held out, of {size} pixels; {args.epochs} epochs",
                self.describe_steps(),
            ]
        )
