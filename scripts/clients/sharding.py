"""Weights that are sharded over processes or kept elsewhere than on the device."""

import copy
import multiprocessing
import tempfile
from typing import Any

import torch

from .case import FORMS, LIMIT, agree, case, error_of, images, new_model, quiet, said_by, trained


@case()
def fsdp2() -> str:
    """``fully_shard`` of the deployed form over two processes, the weights changed in place and by a state dict."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_shard, args=(rank, f"file://{folder}/store", results)) for rank in (0, 1)]
        for process in processes:
            process.start()
        try:
            found = [results.get(timeout=300) for _ in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
    for errors in found:
        assert not isinstance(errors, str), errors
    errors = [error for errors in found for error in errors]
    wrong = sum(not error <= LIMIT for error in errors)
    assert wrong == 0, f"{wrong} of {len(errors)} passes used other weights, off by up to {max(errors):.0e}"
    return f"{len(errors)} passes, error {max(errors):.0e}"


def _shard(rank: int, store: str, results: Any) -> None:
    """Puts into ``results`` the errors that one of two processes finds, or what went wrong."""
    import torch.distributed as dist

    with quiet():
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
        try:
            dist.init_process_group(backend="gloo", init_method=store, rank=rank, world_size=2)
            results.put(_fsdp2_errors(repetitions=10))
            dist.barrier()
            dist.destroy_process_group()
        except Exception as error:
            results.put(said_by(error))


@torch.no_grad()
def _fsdp2_errors(repetitions: int) -> list[float]:
    """Returns the errors of a sharded model against one that is not, after every change of the weights."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    errors = []
    mesh = init_device_mesh(device_type="cpu", mesh_shape=(2,))
    for seed in range(repetitions):
        torch.manual_seed(seed)
        plain = new_model().reparameterize()
        sharded: Any = copy.deepcopy(plain)
        for stage in sharded.stages:
            for block in stage.blocks:
                fully_shard(block, mesh=mesh)
        # By default the root's parameters stay whole after a pass, and in-place changes of these are lost.
        fully_shard(sharded, mesh=mesh, reshard_after_forward=True)
        x = images()
        errors.append(error_of(sharded(x), plain(x)))
        for model in (plain, sharded):
            for parameter in model.parameters():
                parameter.mul_(0.9)
        errors.append(error_of(sharded(x), plain(x)))
        weights = new_model().reparameterize().state_dict()
        plain.load_state_dict(weights)
        set_model_state_dict(
            model=sharded, model_state_dict=weights, options=StateDictOptions(full_state_dict=True, strict=True)
        )
        errors.append(error_of(sharded(x), plain(x)))
    return errors


@case("accelerate")
def accelerate_offload() -> str:
    """accelerate's offload to memory and to disk: a tensor is there only while its own module's ``forward`` runs."""
    from accelerate import cpu_offload, disk_offload

    errors = []
    for form in FORMS:
        model, x = trained(form), images()
        with torch.no_grad():
            expected = model(x)
        for offload_buffers in (False, True):
            for where in ("cpu", "disk"):
                with tempfile.TemporaryDirectory() as folder:
                    if where == "cpu":
                        offloaded = cpu_offload(model=copy.deepcopy(model), offload_buffers=offload_buffers)
                    else:
                        offloaded = disk_offload(
                            model=copy.deepcopy(model), offload_dir=folder, offload_buffers=offload_buffers
                        )
                    assert next(offloaded.parameters()).is_meta, "nothing was offloaded: the case shows nothing"
                    for grad in (False, True):
                        with torch.set_grad_enabled(grad):
                            what = f"{form} form, {where}, offload_buffers={offload_buffers}, gradients {grad}"
                            errors.append(agree(offloaded(x), expected, what))
    return f"error {max(errors):.0e}"
