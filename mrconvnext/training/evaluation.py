"""Loss and accuracy of a model over all data of a split."""

import torch
from torch import nn
from torch.utils.data import DataLoader

from .precision import Precision
from .processes import Processes
from .samples import NO_TARGET, UnreadableFiles


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader, precision: Precision, processes: Processes, unreadable: UnreadableFiles
) -> dict[str, float]:
    """Returns loss and accuracies in % over the data of all processes, but for images that can't be read.

    Args:
        model: Model, which is left in eval mode.
        loader: This process's batches of inputs, classes and names of unreadable files.
        precision: What the model computes in.
        processes: Those that evaluate together.
        unreadable: Takes the names.

    Raises:
        UserError: If there are too many unreadable files.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=processes.device)
    for batch, targets, *names in loader:
        unreadable.note(names)
        targets = targets.to(processes.device, non_blocking=True)
        with precision.autocast():
            logits = model(*precision.inputs(batch)).double()
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=NO_TARGET)
        # Counts, where timm's `accuracy` has shares: of a batch without a readable image there are none.
        right = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        sums += torch.stack([loss, right[:, :1].sum(), right.sum(), (targets != NO_TARGET).sum()])
    unreadable.check(processes)
    loss_sum, top1, top5, count = processes.total(*sums.tolist())
    return {"loss": loss_sum / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}
