"""Encoders of sequences: what padding may not change, step by step, both forms, what is refused."""

import copy
import json
import re
import warnings
from pathlib import Path

import onnxruntime
import pytest
import torch
from helpers import assert_agree, randomize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mrconvnext import MRConvSequence
from mrconvnext.kernels import KERNELS

LENGTHS = (60, 41, 1, 17)


def model_of(**options) -> MRConvSequence:
    """Returns a small model in eval mode with the parameters and statistics of a trained one."""
    torch.manual_seed(0)
    own = {"num_classes": 5, "length": 60, "dim": 8, "depth": 2, **options}
    if "channels" not in own:
        own.setdefault("vocabulary", 11)
    model = randomize(MRConvSequence(**own)).eval()
    with torch.no_grad():
        for block in model.blocks:
            if block.conv.kernel is None:
                block.conv.alpha.uniform_(-1, 1)
    return model


def padded(sequences: list[Tensor], fill: float = 0) -> tuple[Tensor, Tensor]:
    """Returns sequences (L, …) as a batch (B, L, …), padded behind with a number, and the mask of what is real."""
    batch = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=fill)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return batch, torch.arange(batch.shape[1]) < lengths[:, None]


def sequences_of(model: MRConvSequence) -> list[Tensor]:
    if model.vocabulary:
        return [torch.randint(0, model.vocabulary, (n,)) for n in LENGTHS]
    return [torch.randn(n, model.channels, dtype=model.head.weight.dtype) for n in LENGTHS]


KINDS = [
    pytest.param(dict(kernel=kernel, bidirectional=bidirectional), id=f"{kernel}-{bidirectional}")
    for kernel in KERNELS
    for bidirectional in (False, True)
]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padded_batches_equal_single_sequences(options: dict, norm: str, prenorm: bool, pooling: str) -> None:
    model = model_of(norm=norm, prenorm=prenorm, pooling=pooling, **options)
    sequences = sequences_of(model)
    expected = torch.cat([model(sequence[None]) for sequence in sequences])
    assert_agree(model(*padded(sequences)), expected, 1e-5)
    assert_agree(model.reparameterize()(*padded(sequences)), expected, 1e-5)


@pytest.mark.parametrize("branch_norm", ["kernel", "parseval", "batch"])
def test_whatever_stands_in_padding(branch_norm: str) -> None:
    model = model_of(branch_norm=branch_norm, channels=3, bidirectional=True)
    sequences = sequences_of(model)
    expected = model(*padded(sequences))
    for fill in (1e3, float("nan")):
        assert_agree(model(*padded(sequences, fill=fill)), expected, 1e-5)
    front, mask = padded([sequence.flip(0) for sequence in sequences], fill=7.0)
    assert_agree(model(front.flip(1), mask.flip(1)), expected, 1e-5)  # padded before


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("branch_norm", ["kernel", "batch"])
def test_training_takes_no_statistics_of_padding(norm: str, branch_norm: str) -> None:
    short, long = (model_of(norm=norm, branch_norm=branch_norm, bidirectional=True, dtype=torch.float64) for _ in "ab")
    sequences = sequences_of(short)
    batch, mask = padded(sequences)
    more = torch.cat([batch, torch.full((len(batch), 20), 3)], 1)[:, :60]
    wider = torch.cat([mask, torch.zeros(len(mask), 20, dtype=torch.bool)], 1)[:, :60]
    outputs = []
    for model, own, real in ((short, batch, mask), (long, more, wider)):
        model.length = 100
        outputs.append(model.train()(own, real))
        outputs[-1].square().sum().backward()
    assert_agree(outputs[1], outputs[0], 1e-12)
    for (name, a), b in zip(short.state_dict().items(), long.state_dict().values()):
        assert torch.equal(a, b) or (a - b).abs().max() < 1e-12, name
    for (name, a), b in zip(short.named_parameters(), long.parameters()):
        assert (a.grad - b.grad).abs().max() <= 1e-10 * max(1, a.grad.abs().max()), name


def test_masked_statistics_are_those_of_the_real_positions() -> None:
    model = model_of(norm="batch", depth=1, dtype=torch.float64)
    block = model.blocks[0]
    batch, mask = padded(sequences_of(model))
    with torch.no_grad():
        block.norm.norm.running_mean.zero_()
        block.norm.norm.momentum = 1.0
        x = model.embedding(batch)
        y = x + block.mix_channels(block.conv(x.mT, mask).mT)
        model.train()(batch, mask)
    assert_agree(block.norm.norm.running_mean, y[mask].mean(0), 1e-12)


def test_parseval_is_not_trained_with_a_mask() -> None:
    model = model_of(branch_norm="parseval").train()
    batch, mask = padded(sequences_of(model))
    with pytest.raises(ValueError, match="parseval.* can't be trained with a mask"):
        model(batch, mask)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "last", "none"])
@pytest.mark.parametrize("deployed", [False, True])
def test_step_by_step(norm: str, prenorm: bool, pooling: str, deployed: bool) -> None:
    model = model_of(norm=norm, prenorm=prenorm, pooling=pooling)
    if deployed:
        model.reparameterize()
    tokens = torch.randint(0, 11, (3, 60))
    state = model.start(3)
    for t in range(60):
        y, state = model.step(tokens[:, t], state)
        if t in (0, 30, 59):
            expected = model(tokens[:, : t + 1])
            assert_agree(y, expected[:, -1] if pooling == "none" else expected, 1e-5)


def test_steps_of_vectors() -> None:
    model = model_of(channels=2, kernel="sgconv", pooling="none")
    x = torch.randn(2, 30, 2)
    state, outputs = model.start(2), []
    for position in x.unbind(1):
        y, state = model.step(position, state)
        outputs.append(y)
    assert_agree(torch.stack(outputs, 1), model(x), 1e-5)


def test_pairs_compare_their_sequences() -> None:
    model = model_of(pairs=True)
    sequences = sequences_of(model)
    batch, mask = padded(sequences)
    pairs, masks = batch.unflatten(0, (2, 2)), mask.unflatten(0, (2, 2))
    single = torch.cat(
        [model(torch.stack([padded(sequences[i : i + 2])[0]]), padded(sequences[i : i + 2])[1][None]) for i in (0, 2)]
    )
    assert_agree(model(pairs, masks), single, 1e-5)
    assert not torch.allclose(model(pairs.flip(1), masks.flip(1)), model(pairs, masks))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fused", [False, True])
def test_travels_as_safetensors_with_a_config(kernel: str, fused: bool, tmp_path: Path) -> None:
    model = model_of(kernel=kernel, norm="layer", bidirectional=True, pooling="last")
    if fused:
        model.reparameterize()
    model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        *("README.md", "config.json", "model.safetensors")
    ]
    loaded = MRConvSequence.from_pretrained(tmp_path / "model").eval()
    tokens = torch.randint(0, 11, (2, 60))
    assert torch.equal(loaded(tokens), model(tokens))
    assert (loaded.blocks[0].conv.kernel is not None) == fused


def test_names_of_kernels_and_of_what_does_not_decay() -> None:
    model = model_of(kernel="fourier_sparse")
    assert model.no_weight_decay() == model.kernel_parameters()
    assert {name.rpartition(".")[2] for name in model.kernel_parameters()} == {
        *("alpha", "coefficients", "values", "fourier_scale", "sparse_scale")
    }
    sgconv = model_of(kernel="sgconv")
    assert sgconv.no_weight_decay() == {f"blocks.{i}.conv.alpha" for i in range(2)}
    assert "blocks.0.conv.kernels.values" in sgconv.kernel_parameters()


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_parameter_has_a_gradient(kernel: str) -> None:
    model = model_of(kernel=kernel, dropout=0.1).train()
    model(torch.randint(0, 11, (4, 60))).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_resampled_kernels_follow_the_rate() -> None:
    model = model_of(channels=1, kernel="fourier", norm="layer", length=120)
    t = torch.linspace(0, 1, 121, dtype=torch.float64)[:-1]
    x = torch.stack([(2 * torch.pi * (3 * t + phase)).sin() for phase in (0, 0.3)])[..., None].float()
    expected = model(x)
    kept, moved = (copy.deepcopy(model) for _ in "ab")
    moved.resample(0.5)
    assert moved.length == 60
    errors = [(own(x[:, ::2]) - expected).abs().max() for own in (moved, kept)]
    assert errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("rate", [2, 3, 6, 7, 30])
def test_every_so_many_positions_of_a_sequence_fit_a_resampled_model(rate: int) -> None:
    x = torch.randn(1, 100, 1)[:, ::rate]
    model = model_of(channels=1, length=100).resample(1 / rate)
    assert model.length == x.shape[1] and model(x).isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
def test_a_resampled_model_travels(fused: bool, tmp_path: Path) -> None:
    model = model_of(channels=1, kernel="fourier", bidirectional=True).resample(0.5)
    if fused:
        model.reparameterize()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 30, 1)
    loaded = MRConvSequence.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(x), model(x)) and loaded.length == 30


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(num_classes=0), "num_classes must be an integer of at least 1"),
        (dict(length=0), "length must be an integer of at least 1"),
        (dict(depth=-1), "depth must be an integer of at least 1"),
        (dict(norm="group"), "norm must be one of batch, layer, got 'group'"),
        (dict(pooling="max"), "pooling must be one of mean, last, none, got 'max'"),
        (dict(channels=3, vocabulary=3), "give vocabulary or channels, one of the two; got 3 and 3"),
        (dict(vocabulary=0), "give vocabulary or channels"),
        (dict(pairs=True, pooling="none"), "pairs need pooling"),
        (dict(vocabulary=5.0), "vocabulary must be an integer of at least 1, got 5.0"),
        (dict(dropout=2), "dropout must be a number from 0 to 1, got 2"),
        (dict(prenorm="yes"), "prenorm must be True or False, got 'yes'"),
        (dict(min_length=100), "min_length must be an integer from 1 to the sequence's length 60"),
    ],
)
def test_bad_options_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model_of(**options)


TOKENS = torch.zeros(2, 10, dtype=torch.int64)


@pytest.mark.parametrize(
    ("x", "mask", "words"),
    [
        (TOKENS + 11, None, r"tokens must lie in 0 … 10, got 11 … 11"),
        (TOKENS - 1, None, r"tokens must lie in 0 … 10, got -1 … -1"),
        (TOKENS[:, :0], None, "from 1 to length=60 positions, got 0"),
        (TOKENS.repeat(1, 7), None, "from 1 to length=60 positions, got 70"),
        (TOKENS[0], None, r"x must be tokens \(B, L\), got \[10\]"),
        (TOKENS, torch.ones(2, 9, dtype=torch.bool), r"mask must be boolean \[2, 10\], got torch.bool \[2, 9\]"),
        (TOKENS, torch.ones(2, 10), r"mask must be boolean \[2, 10\], got torch.float32"),
        (TOKENS, torch.tensor([[True], [False]]).expand(2, 10), "there is one without a position"),
    ],
)
def test_bad_inputs_are_named(x: Tensor, mask: Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model_of()(x, mask)


def test_inputs_of_another_type_are_named() -> None:
    with pytest.raises(TypeError, match="tokens must be int64 or int32, got torch.float32"):
        model_of()(TOKENS.float())
    with pytest.raises(TypeError, match="must be of floating-point numbers, got torch.int64"):
        model_of(channels=1)(TOKENS[..., None])
    with pytest.raises(ValueError, match=r"vectors \(B, L, 2\), got \[2, 10, 1\]"):
        model_of(channels=2)(TOKENS[..., None].float())
    with pytest.raises(ValueError, match=r"pairs of sequences, \(B, 2, L\) .* got \[2, 10\]"):
        model_of(pairs=True)(TOKENS)


def test_steps_keep_no_graph_and_leave_the_model_as_it_is() -> None:
    model = model_of()
    state = model.start(2)
    for _ in range(3):
        y, state = model.step(torch.zeros(2, dtype=torch.int64), state)
    assert not y.requires_grad and not state.total.requires_grad
    assert torch.equal(
        model.step(torch.ones(2, dtype=torch.int64), copy.deepcopy(state))[0],
        model.step(torch.ones(2, dtype=torch.int64), state)[0],
    )
    with pytest.raises(RuntimeError, match=r"step is for a model in evaluation: call eval\(\) before"):
        model.train().step(torch.zeros(2, dtype=torch.int64), state)


def test_states_of_others_are_refused() -> None:
    model = model_of()
    with pytest.raises(ValueError, match=r"x must be \[4\], for the state of 4 sequences, got \[1\]"):
        model.step(torch.zeros(1, dtype=torch.int64), model.start(4))
    with pytest.raises(ValueError, match="state must be of a model of 2 blocks, got 3"):
        model.step(torch.zeros(1, dtype=torch.int64), model_of(depth=3).start(1))
    with pytest.raises(ValueError, match="got .* 4 channels"):
        model.step(torch.zeros(1, dtype=torch.int64), model_of(dim=4).start(1))
    other = model_of(bidirectional=True).reparameterize()
    model.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="reaches ahead"):
        model.start(1)


def test_padding_that_is_no_number_leaves_gradients_alone() -> None:
    model = model_of(channels=2, bidirectional=True).train()
    model(*padded(sequences_of(model), fill=float("nan"))).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_masks_of_pairs_have_their_shape() -> None:
    pairs = torch.zeros(3, 2, 10, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"mask must be boolean \[3, 2, 10\], got torch.bool \[2, 3, 10\]"):
        model_of(pairs=True)(pairs, torch.ones(2, 3, 10, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_type_travels(dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = MRConvSequence.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(TOKENS), model(TOKENS)) and loaded.head.weight.dtype == dtype


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("change", ["head.bias", "blocks.1.conv.", "depth", "kernel", "norm", "config", "weights"])
def test_what_does_not_fit_is_refused(change: str, fused: bool, tmp_path: Path) -> None:
    if fused and change == "kernel":
        return  # whose name makes no difference to the deployed form
    model = model_of(kernel="fourier")
    (model.reparameterize() if fused else model).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if change == "config":
        config.write_text("oak")
    elif change == "weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change in ("depth", "kernel", "norm"):
        other = {"depth": 3, "kernel": "sparse", "norm": "layer"}[change]
        config.write_text(json.dumps({**json.loads(config.read_text()), change: other}))
    else:
        save_file({name: x for name, x in load_file(weights).items() if not name.startswith(change)}, weights)
    with pytest.raises(ValueError, match=f"{tmp_path.name} does not hold an MRConvSequence"):
        MRConvSequence.from_pretrained(tmp_path)


def test_folders_that_hold_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not hold an MRConvSequence.*config.json"):
        MRConvSequence.from_pretrained(tmp_path)


def test_onnx(tmp_path: Path) -> None:
    model = model_of(exportable=True, bidirectional=True).reparameterize()
    batch, mask = padded(sequences_of(model))
    for dynamo in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (batch, mask), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        inputs = dict(zip((own.name for own in session.get_inputs()), (batch.numpy(), mask.numpy())))
        (found,) = session.run(None, inputs)
        assert_agree(torch.from_numpy(found), model(batch, mask), 1e-5)


def test_what_can_not_be_run_step_by_step_says_so() -> None:
    with pytest.raises(RuntimeError, match="bidirectional=True can't be run position by position"):
        model_of(bidirectional=True).start(1)
    with pytest.raises(RuntimeError, match=r"call eval\(\) before"):
        model_of().train().start(1)
    with pytest.raises(ValueError, match="compares pairs"):
        model_of(pairs=True).start(1)
    model = model_of()
    with pytest.raises(ValueError, match=r"tokens must lie in 0 … 10, got 11"):
        model.step(torch.tensor([11]), model.start(1))


@pytest.mark.slow
def test_the_examples_of_the_document_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = (Path(__file__).parents[1] / "docs" / "sequences.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    assert len(examples) == 4
    names: dict = {}
    with torch.no_grad():
        for example in examples:
            exec(example, names)
    expected = names["model"](names["tokens"])
    assert_agree(names["logits"], expected, 1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused"]
