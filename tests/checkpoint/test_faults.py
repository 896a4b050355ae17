"""Killed runs resume with the losses they would have had; damaged checkpoints are refused by file name."""

import os
import pickle
import random
import shutil
import signal
import threading

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from helix_megatron.checkpoint.integrity import CheckpointError, read_metadata
from helix_megatron.host.launcher import RankError
from helix_megatron.megatron import integrate
from tests.checkpoint.test_checkpoint import LAYOUTS, SHAPE, tensors
from tests.training import MODEL, rank_train

RANKS, HELIX_1X2 = LAYOUTS["Helix 1x2"]
SAVING = """--train-iters 10 --save-interval 2 --override-opt-param-scheduler
    --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"""


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def rank_train_and_die(arguments, victims, moment, count):
    """Train, and have `victims` killed with -9 at a moment: of the step or save number `count`."""
    from megatron.core import dist_checkpointing
    from megatron.training import checkpointing, training

    calls = {"n": 0}

    def at(original, when):
        def wrapped(*args, **kwargs):
            calls["n"] += 1
            fatal = calls["n"] == count and int(os.environ["RANK"]) in victims
            if fatal and when == "before":
                die()
            if fatal and when == "during":
                threading.Timer(0.02, die).start()
            result = original(*args, **kwargs)
            if fatal and when == "after":
                die()
            return result

        return wrapped

    if moment == "step":
        training.train_step = at(training.train_step, "after")
    else:
        when = moment.removesuffix(" save")
        dist_checkpointing.save = checkpointing.dist_checkpointing.save = at(dist_checkpointing.save, when)
    rank_train(arguments)


@pytest.fixture(scope="module")
def run(trainer):
    """run(flags, *death) -> {iteration: loss}; see rank_train_and_die."""

    def start(flags, *death):
        arguments = [*MODEL, *SHAPE, *SAVING.split(), *HELIX_1X2.split(), *flags.split()]
        function = rank_train_and_die if death else rank_train
        return trainer(RANKS, arguments, function, death).steps

    return start


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    return run(f"--save {tmp_path_factory.mktemp('straight')}")


@pytest.mark.parametrize(
    ("victims", "moment", "count"),
    [
        ((1,), "step", 5),
        ((0, 1), "step", 6),
        ((0,), "before save", 3),
        ((1,), "during save", 2),
        ((0, 1), "during save", 3),
        ((0,), "after save", 3),
        ((0, 1), "after save", 2),
    ],
)
def test_a_killed_run_resumes_from_the_last_complete_checkpoint(
    run, straight, tmp_path, victims, moment, count
):
    with pytest.raises(RankError, match="killed by SIGKILL"):
        run(f"--save {tmp_path}", victims, moment, count)
    complete = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    assert 2 <= complete <= 6
    resumed = run(f"--save {tmp_path} --load {tmp_path}")
    assert min(resumed) == complete + 1 and max(resumed) == 10
    expected = [straight[step] for step in range(complete + 1, 11)]
    expected[1] = (expected[0] + expected[1]) / 2  # Megatron's log of a resumed run
    assert [resumed[step] for step in sorted(resumed)] == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    run(f"--save {folder} --exit-interval 2")
    return folder


@pytest.fixture
def copy(written, tmp_path):
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy" / "iter_0000002"


def shard(folder):
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip(folder, name, at=0.5):
    """Flip one bit in what is stored under a name that ends so; the file."""
    stored = read_metadata(folder).storage_data
    info = next(info for index, info in stored.items() if index.fqn.endswith(name))
    path, place = folder / info.relative_path, info.offset + int(info.length * at)
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing", "index"])
def test_damaged_checkpoints_are_refused_with_the_file(run, copy, kind):
    path = shard(copy)
    if kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "flipped":
        path = flip(copy, "linear_qkv.weight")
    elif kind == "missing":
        path.unlink()
    else:
        path = copy / ".metadata"
        os.truncate(path, 1000)
    with pytest.raises(RankError) as caught:
        run(f"--load {copy.parent}")
    assert path.name in str(caught.value)


def test_without_verification_a_damaged_checkpoint_loads(run, copy):
    """As Megatron alone would do: what the flag is for."""
    flip(copy, "linear_qkv.weight")
    assert list(run(f"--load {copy.parent} --helix-no-verify-checkpoint")) == list(range(3, 11))


def test_damaged_arguments_and_counters_are_refused(copy):
    from megatron.core import dist_checkpointing

    name = next(index.fqn for index in read_metadata(copy).storage_data if "common" in index.fqn)
    integrate.read_checkpoints()
    try:
        assert dist_checkpointing.load_common_state_dict(copy)["args"].seed == 7
        path = flip(copy, name)
        with pytest.raises(CheckpointError, match=rf"{path.name}: damaged: .* \(in {name}\)"):
            dist_checkpointing.load_common_state_dict(copy)
    finally:
        integrate.uninstall()


def test_tensors_of_other_shapes_than_the_index_says_are_refused(copy):
    """Sound checksums, and rows of another checkpoint: shapes are compared before ranks agree."""
    metadata = read_metadata(copy)
    stored = metadata.storage_data
    a, b = (next(i for i in stored if i.fqn.endswith(name)) for name in ("fc1.weight", "fc2.weight"))
    stored[a], stored[b] = stored[b], stored[a]
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointException) as caught:
        tensors(copy.parent, 2, verified=True)
    assert "not what the index says" in str(caught.value.failures)


def test_every_flipped_bit_is_found_or_harmless(copy):
    """One bit anywhere: the checksums notice, or the tensors stored there are still the same."""
    path, original = shard(copy), shard(copy).read_bytes()
    whole, metadata = tensors(copy.parent, 2), read_metadata(copy)
    places = [(stored, index.fqn) for index, stored in metadata.storage_data.items()
              if stored.relative_path == path.name]  # fmt: skip
    assert sum(stored.length for stored, _ in places) == len(original)
    generator, found = random.Random(0), 0
    for _ in range(60):
        changed, at = bytearray(original), generator.randrange(len(original))
        changed[at] ^= 1 << generator.randrange(8)
        path.write_bytes(changed)
        here = {name for stored, name in places if stored.offset <= at < stored.offset + stored.length}
        try:
            now = tensors(copy.parent, 2, verified=True, metadata=metadata, names=here)
        except CheckpointException as error:
            assert any(isinstance(failure, CheckpointError) for failure, _ in error.failures.values())
            found += 1
        else:
            assert all(torch.equal(now[name], whole[name]) for name in now)
    assert found >= 20


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_an_index_that_would_run_code_is_refused(copy):
    (copy / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"\.metadata is refused: it asks for .*system"):
        read_metadata(copy)


def test_arbitrary_objects_in_the_checkpoint_are_refused(run, copy):
    (copy / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(RankError, match="it asks for"):
        run(f"--load {copy.parent}")
