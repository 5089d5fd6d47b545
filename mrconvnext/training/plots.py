"""A picture of a training run. Needs matplotlib."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def plot_training(rows: list[dict[str, float]]) -> Figure:
    """Returns a picture of losses and top-1 accuracies over the epochs.

    Args:
        rows: One for each epoch, with ``epoch``, ``train_loss``, ``loss``, ``top1`` and, of averaged weights,
            ``ema_loss`` and ``ema_top1``.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for axes, columns, title in (
        (losses, {"train_loss": "training", "loss": "held out", "ema_loss": "held out, averaged"}, "loss"),
        (accuracies, {"top1": "held out", "ema_top1": "held out, averaged"}, "top-1 accuracy, %"),
    ):
        for column, label in columns.items():
            if column in rows[0]:
                axes.plot(epochs, [row[column] for row in rows], marker=".", label=label)
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        axes.grid(alpha=0.3)
    return figure
