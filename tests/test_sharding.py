"""FSDP2: weights that are sharded over two processes, and put together where a module's ``forward`` runs."""

import copy
import multiprocessing
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import FORMS, images, layers_of, model_in, randomize, relative_error
from torch import nn

PROCESSES = 2


def sharded_copy(model: nn.Module, of_layers: bool) -> nn.Module:
    """Returns a model sharded by its blocks, or by our layers, and as a whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = copy.deepcopy(model)
    mesh = init_device_mesh(device_type="cpu", mesh_shape=(PROCESSES,))
    for part in layers_of(sharded) if of_layers else [block for stage in sharded.stages for block in stage.blocks]:
        fully_shard(part, mesh=mesh)
    # By default the root's parameters stay whole after a pass, and changes of these in place are lost.
    fully_shard(sharded, mesh=mesh, reshard_after_forward=True)
    return sharded


def errors_of(branch_norm: str, deployed: bool, of_layers: bool) -> dict[str, float]:
    """Returns how far a sharded model is from one that is not, after every way of changing weights."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    torch.manual_seed(0)  # all processes have the same weights
    plain = model_in(branch_norm, deployed)
    sharded, x, errors = sharded_copy(plain, of_layers), images(), {}

    def compare(what: str) -> None:
        with torch.no_grad():
            errors[what] = relative_error(sharded(x), plain(x))

    compare("at first")
    for model in (plain, sharded):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    compare("in place")
    weights = randomize(model_in(branch_norm, deployed), seed=1).state_dict()
    plain.load_state_dict(weights)
    options = StateDictOptions(full_state_dict=True, strict=True)
    set_model_state_dict(model=sharded, model_state_dict=weights, options=options)
    compare("by a state dict")
    for model in (plain, sharded):
        optimizer = torch.optim.SGD(params=model.parameters(), lr=1e-2)
        model.train()(x).square().mean().backward()
        optimizer.step()
        model.eval()
    compare("by a step of training")
    return errors


def run_process(rank: int, folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(file_name=str(folder / "store"), world_size=PROCESSES)
    dist.init_process_group(backend="gloo", store=store, rank=rank, world_size=PROCESSES)
    try:
        cases = [(*form, of_layers) for form in FORMS for of_layers in (False, True)]
        results.put({case: errors_of(*case) for case in cases})
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        results.put(traceback.format_exc())


@pytest.mark.slow
def test_a_sharded_model_computes_with_the_weights_it_has(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=run_process, args=(rank, tmp_path, results)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=300) for _ in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    for cases in found:
        assert not isinstance(cases, str), cases
        wrong = {
            (case, what): error for case, errors in cases.items() for what, error in errors.items() if error > 1e-5
        }
        assert not wrong
