"""The entry points as a user starts them: equal losses at T=1 and T=2, YAML equal to flags, refusals."""

import re
import subprocess
import sys

import pytest

from helix_megatron.host.launcher import run_ranks
from helix_megatron.models import data

MODEL = """
host: true
ENV_VARS:
  HELIX_TEST_VARIABLE: 7
MODEL_ARGS:
  num-layers: 2
  hidden-size: 32
  num-attention-heads: 4
  seq-length: 16
  max-position-embeddings: 16
  micro-batch-size: 1
  global-batch-size: 2
  train-iters: 4
  lr: 1.0e-3
  min-lr: 1.0e-3
  lr-decay-style: constant
  tokenizer-type: NullTokenizer
  vocab-size: 257
  padded-vocab-size: 272
  transformer-impl: local
  position-embedding-type: rope
  use-cpu-initialization: true
  no-gradient-accumulation-fusion: true
  no-masked-softmax-fusion: true
  no-rope-fusion: true
  no-bias-dropout-fusion: true
  no-persist-layer-norm: true
  log-interval: 1
  eval-iters: 0
  eval-interval: 100
  split: "99,1,0"
  attention-dropout: 0.0
  hidden-dropout: 0.0
  num-workers: 0
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "model.yaml"
    path.write_text(MODEL)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "text"
    data.write(prefix)
    return prefix


def train(tmp_path, ranks, *arguments):
    """Start pretrain_gpt through the launcher; the losses that the last rank printed, in full."""
    command = [
        sys.executable,
        "-m",
        "helix_megatron.launch",
        "--nproc-per-node",
        str(ranks),
        "--timeout",
        "100",
    ]
    command += ["--log-dir", str(tmp_path), "-m", "helix_megatron.pretrain_gpt", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    output = run.stdout if ranks == 1 else (tmp_path / f"rank_{ranks - 1}.log").read_text()
    return re.findall(r"lm loss: (\S+)", output)


def flags_of_model():
    """MODEL as a command line, without the code under test: every key a flag."""
    lines = [line.strip() for line in MODEL.split("MODEL_ARGS:")[1].strip().splitlines()]
    flags = ["--helix-host-mode"]
    for name, value in (line.split(": ") for line in lines):
        flags += [f"--{name}"] if value == "true" else [f"--{name}", value.strip('"')]
    return flags


def test_losses_do_not_depend_on_tp_nor_on_the_form_of_the_flags(model, text, tmp_path):
    yaml_losses = train(tmp_path, 1, "--helix-config", model, "--data-path", text)
    assert len(yaml_losses) == 4
    assert len(set(yaml_losses)) == 4  # it does train
    flag_losses = train(
        tmp_path, 2, *flags_of_model(), "--data-path", text, "--tensor-model-parallel-size", 2
    )
    assert flag_losses == yaml_losses
    overridden = train(tmp_path, 1, "--helix-config", model, "--data-path", text, "--train-iters", 2)
    assert len(overridden) == 2


def refusal(arguments):
    """Exit code and stderr of pretrain_gpt.main in a rank, and a variable that the YAML sets."""
    import contextlib
    import io
    import os

    from helix_megatron import pretrain_gpt

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = pretrain_gpt.main(arguments)
    return code, errors.getvalue(), os.environ.get("HELIX_TEST_VARIABLE")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num-layer", "2"], ["no flag --num-layer; did you mean --num-layers?"]),
        (["--mock-data", "--sft"], ["--sft is not supported", "-m helix_megatron.run"]),
        (["--mock-data", "--fim-data"], ["--fim-data is not supported"]),
        (["--mock-data", "--perform-rl-step"], ["--perform-rl-step is not supported"]),
        (["--mock-data", "--tensor-model-parallel-size", "2"], ["world size (1) is not divisible"]),
        (
            ["--mock-data", "--attention-impl", "helix", "--helix-head-parallel-size", "3"],
            ["n=3", "legal grids"],
        ),
    ],
)
def test_refused_configurations_are_one_line_and_exit_2(model, arguments, words):
    code, errors, variable = run_ranks(refusal, 1, ["--helix-config", str(model), *arguments], timeout_s=60)[
        0
    ]
    message = [line for line in errors.splitlines() if line.startswith("helix_megatron.pretrain_gpt: ")]
    assert code == 2
    assert len(message) == 1
    assert "Traceback" not in errors
    assert variable == "7"
    for word in words:
        assert word in message[0]


def broken(_arguments):
    from helix_megatron.megatron import entry

    def body():
        int("seven")  # a ValueError, but none of the configuration's

    return entry.run_guarded(body, "test")


def test_faults_of_the_program_keep_their_traceback():
    with pytest.raises(ValueError, match="seven"):
        broken([])


SCRIPT = """
import sys
import neighbour
from megatron.training.arguments import parse_and_validate_args

if __name__ == "__main__":
    args = parse_and_validate_args()
    print(neighbour.NAME, args.attention_impl, args.num_layers, sys.argv[0].endswith("script.py"))
"""


def run_script(*arguments):
    command = [sys.executable, "-W", "ignore", "-m", "helix_megatron.run", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_run_gives_an_unmodified_script_the_flags(model, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("NAME = 'found its neighbour'")
    run = run_script(
        *(tmp_path / "script.py", "--helix-config", model, "--mock-data", "--num-layers", 3),
        *("--attention-impl", "helix"),
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[-1] == "found its neighbour helix 3 True"


def test_run_refuses_a_missing_script():
    from helix_megatron import run

    assert run.main(["nowhere.py"]) == 2
    assert run.main(["--attention-impl", "helix"]) == 2


# ---- the choice of a grid ----
def rank_log(line):
    """What rank 0 of four logs about Helix while Megatron's arguments are read."""
    import contextlib
    import io
    import os

    from megatron.training.arguments import parse_and_validate_args

    from helix_megatron.megatron import integrate

    os.environ["WORLD_SIZE"] = "4"  # read by the parser; nothing is started
    del os.environ["MASTER_ADDR"]  # and no rank is there to agree with
    integrate.install()
    printed = io.StringIO()
    sys.argv = ["pretrain_gpt", *line]
    with contextlib.redirect_stdout(printed):
        parse_and_validate_args()
    return [text for text in printed.getvalue().splitlines() if text.startswith("> Helix")]


@pytest.mark.training
def test_the_choice_of_a_grid_is_logged_with_its_reason():
    from tests.training import HELIX, MODEL

    def line(heads, groups, *flags):
        layout = f"{HELIX} --tensor-model-parallel-size 4 --num-attention-heads {heads}"
        return [*MODEL, *layout.split(), "--num-query-groups", str(groups), *flags]

    lines = (
        line(12, 2),
        line(8, 4),
        line(12, 2, "--helix-head-parallel-size", "1"),
        line(12, 2, "--helix-dim-parallel-size", "2"),
    )
    chosen, whole, given, half = (run_ranks(rank_log, 1, arguments)[0] for arguments in lines)
    # 2x2: K and V of one KV head, a slice of 8 from one rank; 1x4: of the one needed, slices of 4 from three
    assert chosen[1] == (
        "> Helix chose grid 2x2: most head groups, so least to exchange: 16 elements a token and layer "
        "against 24 for 1x4"
    )
    assert (
        whole[1] == "> Helix chose grid 4x1: tp = 4 divides the 4 KV heads, nothing is exchanged in attention"
    )
    assert [len(lines) for lines in (chosen, whole, given, half)] == [2, 2, 1, 1]


@pytest.mark.training
def test_a_training_run_logs_its_choice(tmp_path, trainer):
    from tests.training import HELIX, MODEL, rank_train

    flags = f"{HELIX} --tensor-model-parallel-size 2 --train-iters 1 --data-cache-path {trainer.index}"
    run_ranks(rank_train, 2, [*MODEL, *flags.split()], log_dir=tmp_path)
    logs = [(tmp_path / f"rank_{rank}.log").read_text() for rank in range(2)]
    assert "> Helix chose grid 1x2: most head groups, so least to exchange" in logs[0]
    assert "Helix chose" not in logs[1]
