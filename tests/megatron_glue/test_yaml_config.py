"""YAML files as flags: what becomes what, what is refused and how; Megatron's parser is the judge."""

import pytest

from helix_megatron.megatron import yaml_config

KNOWN = [
    "--num-layers",
    "--sequence-parallel",
    "--use-distributed-optimizer",
    "--data-path",
    "--lr",
    "--split",
]


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def argv_of(tmp_path, text):
    config = yaml_config.load(write(tmp_path, text))
    return yaml_config.to_argv(config.model_args, "here", KNOWN)


def test_values_become_flags(tmp_path):
    argv = argv_of(
        tmp_path,
        """
        MODEL_ARGS:
          num-layers: 16
          --sequence-parallel: true
          use-distributed-optimizer: false
          data-path: [0.3, books, 0.7, web]
          lr: 1.0e-4
          split: "99,1,0"
        """,
    )
    assert argv == [
        *("--num-layers", "16", "--sequence-parallel"),
        *("--data-path", "0.3", "books", "0.7", "web", "--lr", "0.0001", "--split", "99,1,0"),
    ]


def test_environment_and_host(tmp_path):
    config = yaml_config.load(write(tmp_path, "ENV_VARS: {A: 1, B: x}\nhost: true\n"))
    assert (config.env_vars, config.host, config.model_args) == ({"A": "1", "B": "x"}, True, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MODEL_ARG: {}", ["'MODEL_ARG'", "did you mean MODEL_ARGS?"]),
        ("MODEL_ARGS: {num-layer: 2}", ["--num-layer;", "did you mean --num-layers?"]),
        ("MODEL_ARGS: {num_layers: 2}", ["--num_layers;", "did you mean --num-layers?"]),
        ("MODEL_ARGS: {zzz: 2}", ["no flag --zzz."]),
        ("MODEL_ARGS: {lr: }", ["--lr", "None", "write true"]),
        ("MODEL_ARGS: {lr: {a: 1}}", ["--lr", "write true"]),
        ("MODEL_ARGS: {lr: 1, --lr: 2}", ["--lr is given twice"]),
        ("MODEL_ARGS: {lr: 1, lr: 2}", ["run.yaml: 'lr' is given twice, on lines 1 and 1"]),
        ("MODEL_ARGS: {}\nhost: true\nMODEL_ARGS: {}", ["'MODEL_ARGS' is given twice, on lines 1 and 3"]),
        ("ENV_VARS:\n  A: 1\n  B: 2\n  A: 3", ["'A' is given twice, on lines 2 and 4"]),
        ("MODEL_ARGS: {lr: {a: {b: 1, b: 2}}}", ["'b' is given twice"]),
        ("MODEL_ARGS: {data-path: [a, {b: 1, b: 2}]}", ["'b' is given twice"]),
        ("MODEL_ARGS: {<<: {lr: 1}, <<: {lr: 2}}", ["'<<' is given twice"]),
        ("MODEL_ARGS: {lr: [1, null]}", ["--lr", "a list of values"]),
        ("MODEL_ARGS: {lr: [1, [2]]}", ["--lr", "a list of values"]),
        ("MODEL_ARGS: {data-path: !!binary aGVsbG8=}", ["--data-path has the value b'hello'"]),
        ("MODEL_ARGS: {data-path: !!set {a, b}}", ["--data-path has the value {"]),
        ("ENV_VARS: {NO: 1}", ["a key is False", "write it in quotes"]),
        ("ENV_VARS: {A=B: 1}", ["'A=B' = 1 can be no variable of an environment"]),
        ('ENV_VARS: {A: "x\\0y"}', ["can be no variable of an environment"]),
        ("host: true\nMODEL_ARGS: {helix-host-mode: false}", ["host and --helix-host-mode are the same"]),
        ("MODEL_ARGS: {data-path: [true, x]}", ["--data-path", "a list of values"]),
        ("MODEL_ARGS: [lr]", ["expected a mapping"]),
        ("ENV_VARS: {A: true}", ["A has the value True", "1 or 0"]),
        ("host: 1", ["host is 1", "true"]),
        ("[1, 2]", ["list, not a mapping"]),
        ("a: [", ["is not YAML"]),
    ],
)
def test_refusals_are_one_line_and_say_what_would_do(tmp_path, text, words):
    with pytest.raises(ValueError) as refusal:
        argv_of(tmp_path, text)
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_values_are_what_they_look_like(tmp_path):
    """Not what YAML 1.1 makes of them: octal 18, 1,350 in base 60, a date."""
    config = yaml_config.load(write(tmp_path, "ENV_VARS: {UMASK: 022, AT: 22:30, DAY: 2024-01-01, A: 0.5}"))
    assert config.env_vars == {"UMASK": "022", "AT": "22:30", "DAY": "2024-01-01", "A": "0.5"}
    flags = "MODEL_ARGS: {num-layers: 012, split: 99:1:0, lr: 1.5e-3, data-path: [-.5, .25, 1_000, 0x10, -3]}"
    assert argv_of(tmp_path, flags) == [
        *("--num-layers", "012", "--split", "99:1:0", "--lr", "0.0015"),
        *("--data-path", "-0.5", "0.25", "1000", "16", "-3"),
    ]


def test_merged_mappings_are_overridden(tmp_path):
    text = "ENV_VARS: &common {A: 1, B: 2}\nMODEL_ARGS: {<<: *common, A: 3}\n"
    assert yaml_config.load(write(tmp_path, text)).model_args == {"--A": 3, "--B": 2}


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"host: \xff\n")
    with pytest.raises(ValueError, match=r"run.yaml is not UTF-8 text: .* at byte 6"):
        yaml_config.load(path)


def argv_of_files(tmp_path, *parts):
    """argv of a command line whose parts are lists of words, and texts of files."""
    argv = []
    for number, part in enumerate(parts):
        if isinstance(part, str):
            path = tmp_path / f"{number}.yaml"
            path.write_text(part)
            part = ["--helix-config", str(path)]
        argv += part
    rest, found = yaml_config.split_config_files(argv)
    return yaml_config.requests_host_mode(rest, found), yaml_config.join_argv(rest, found)


@pytest.fixture
def helix_flags():
    from helix_megatron.megatron import integrate

    integrate.install()
    yield
    integrate.uninstall()


def parsed(argv):
    """What Megatron's parser makes of argv."""
    return yaml_config.megatron_parser().parse_args(argv)


FIRST = "MODEL_ARGS: {sequence-parallel: true, lr: 0.1, load: here, data-path: [a, b]}"


def test_a_later_file_overrides_an_earlier_one(tmp_path):
    _, argv = argv_of_files(tmp_path, FIRST, "MODEL_ARGS: {lr: 0.2, data-path: [c]}")
    args = parsed(argv)
    assert (args.lr, args.data_path, args.load, args.sequence_parallel) == (0.2, ["c"], "here", True)


def test_false_undoes_what_came_before(tmp_path):
    off = "MODEL_ARGS: {sequence-parallel: false, load: false, data-path: false}"
    args = parsed(argv_of_files(tmp_path, FIRST, off)[1])
    assert (args.lr, args.data_path, args.load, args.sequence_parallel) == (0.1, None, None, False)
    words = ["--sequence-parallel", "--load=there", "--seed", "3"]
    args = parsed(argv_of_files(tmp_path, words, off)[1])  # a command line before the file
    assert (args.sequence_parallel, args.load, args.seed) == (False, None, 3)
    args = parsed(argv_of_files(tmp_path, off, words)[1])  # and after it
    assert (args.sequence_parallel, args.load, args.seed) == (True, "there", 3)
    # Another spelling of the same flag; a flag that has a word for false.
    args = parsed(
        argv_of_files(
            tmp_path, "MODEL_ARGS: {persistent-save-interval: 5}", "MODEL_ARGS: {save-interval: false}"
        )[1]
    )
    assert args.save_interval is None
    assert argv_of_files(tmp_path, "MODEL_ARGS: {rl-skip-bos-token: false}")[1] == ["--no-rl-skip-bos-token"]


def test_host_is_what_the_last_of_them_says(tmp_path, helix_flags):
    on, off = "host: true", "host: false"
    assert argv_of_files(tmp_path, on, off) == (False, [])
    assert argv_of_files(tmp_path, off, on) == (True, ["--helix-host-mode"])
    assert argv_of_files(tmp_path, on, "MODEL_ARGS: {lr: 1}")[0]
    assert argv_of_files(tmp_path, on, "MODEL_ARGS: {helix-host-mode: false}") == (False, [])
    assert argv_of_files(tmp_path, ["--helix-host-mode"], off) == (False, [])
    assert argv_of_files(tmp_path, off, ["--helix-host-mode"]) == (True, ["--helix-host-mode"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: high", ["--lr is 'high'", "takes a number"]),
        ("num-layers: 1.5", ["--num-layers is 1.5", "takes a whole number"]),
        ("num-layers: true", ["--num-layers is true", "takes a whole number"]),
        ("num-layers: [1, 2]", ["--num-layers is [1, 2]", "takes a whole number"]),
        ("normalization: Batch", ["--normalization is 'Batch'", "takes one of LayerNorm, RMSNorm"]),
        ("helix-softmax: soft", ["--helix-softmax is 'soft'", "takes one of exact, per-slice"]),
        ("sequence-parallel: 1", ["--sequence-parallel is 1", "write true, or false"]),
        ("sequence-parallel: 'yes'", ["--sequence-parallel is 'yes'", "write true, or false"]),
        ("helix-slice-weights: []", ["--helix-slice-weights is []", "takes values"]),
        ("save-interval: 1, persistent-save-interval: 2", ["--save-interval and --persistent", "keep one"]),
    ],
)
def test_a_value_that_a_flag_does_not_take_is_one_line(tmp_path, helix_flags, text, words):
    with pytest.raises(ValueError) as refusal:
        argv_of_files(tmp_path, f"MODEL_ARGS: {{{text}}}")
    for word in ["0.yaml: MODEL_ARGS: ", *words]:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    "words", ["--lr high", "--normalization Batch", "--num-layers", "--sequence-parallel 3"]
)
def test_a_command_line_that_the_parser_does_not_take_is_one_line(words):
    with pytest.raises(ValueError) as refusal:
        yaml_config.check_flags(words.split())
    message = str(refusal.value)
    assert "\n" not in message and "usage" not in message and words.split()[-1] in message


@pytest.mark.training
@pytest.mark.parametrize("words", ["--lr high", "--normalization Batch", "--no-such-flag 3"])
def test_a_script_that_parses_its_own_flags_refuses_in_one_line(helix_flags, monkeypatch, capsys, words):
    """Megatron's parser prints 744 lines of usage before it exits."""
    from megatron.training import arguments

    monkeypatch.setattr("sys.argv", ["script", *words.split()])
    with pytest.raises(SystemExit) as refusal:
        arguments.parse_args()
    message = capsys.readouterr().err
    assert refusal.value.code == 2 and "usage" not in message and words.split()[0] in message
    assert message.startswith("Megatron-LM Arguments: ") or message.startswith("script: "), message
    assert message.count("\n") == 1


def test_missing_file_is_refused():
    with pytest.raises(ValueError, match=r"cannot read nowhere.yaml: No such file"):
        yaml_config.load("nowhere.yaml")


def test_python_objects_are_not_built(tmp_path):
    with pytest.raises(ValueError, match="is not YAML"):
        yaml_config.load(write(tmp_path, "MODEL_ARGS: !!python/object/apply:os.getcwd []"))


def test_files_flags_stand_where_the_file_stood(tmp_path):
    path = write(tmp_path, "MODEL_ARGS: {num-layers: 2, lr: 0.1}\nhost: true\n")
    argv = ["--seed", "1", "--helix-config", str(path), "--num-layers", "3"]
    rest, found = yaml_config.split_config_files(argv)
    assert yaml_config.requests_host_mode(rest, found)
    assert yaml_config.join_argv(rest, []) == ["--seed", "1", "--num-layers", "3"]
    with pytest.raises(ValueError, match="--helix-config needs the path"):
        yaml_config.split_config_files(["--helix-config"])
    assert yaml_config.split_config_files([f"--helix-config={path}"])[1][0][2] == str(path)


def test_join_checks_against_megatrons_own_parser(tmp_path):
    path = write(tmp_path, "MODEL_ARGS: {num-layers: 2, sequence-parallel: true}\n")
    argv = yaml_config.join_argv(
        *yaml_config.split_config_files(["--seed", "1", "--helix-config", str(path), "--num-layers", "3"])
    )
    assert argv == ["--seed", "1", "--num-layers", "2", "--sequence-parallel", "--num-layers", "3"]
    twice = ["--helix-config", str(path), "--seed", "1", "--helix-config", str(path)]
    flags = ["--num-layers", "2", "--sequence-parallel"]
    assert yaml_config.join_argv(*yaml_config.split_config_files(twice)) == [*flags, "--seed", "1", *flags]
    path = write(tmp_path, "MODEL_ARGS: {tensor-model-paralel-size: 2}\n")
    with pytest.raises(
        ValueError, match=r"--tensor-model-paralel-size; did you mean --tensor-model-parallel-size\?"
    ):
        yaml_config.join_argv(*yaml_config.split_config_files(["--helix-config", str(path)]))


def test_unknown_flags_of_the_command_line():
    yaml_config.check_flags(["--num-layers", "2", "--lr=0.1", "--seed", "-3"])
    with pytest.raises(ValueError, match=r"no flag --num-layer; did you mean --num-layers\?"):
        yaml_config.check_flags(["--num-layer=2"])
