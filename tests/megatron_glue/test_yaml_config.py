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


def test_missing_file_is_refused():
    with pytest.raises(ValueError, match=r"cannot read nowhere.yaml: No such file"):
        yaml_config.load("nowhere.yaml")


def test_python_objects_are_not_built(tmp_path):
    with pytest.raises(ValueError, match="is not YAML"):
        yaml_config.load(write(tmp_path, "MODEL_ARGS: !!python/object/apply:os.getcwd []"))


def test_files_flags_stand_where_the_file_stood(tmp_path):
    path = write(tmp_path, "MODEL_ARGS: {num-layers: 2, lr: 0.1}\nhost: true\n")
    rest, found = yaml_config.split(["--seed", "1", "--helix-config", str(path), "--num-layers", "3"])
    assert yaml_config.wants_host(rest, found)
    assert yaml_config.join(rest, []) == ["--seed", "1", "--num-layers", "3"]
    with pytest.raises(ValueError, match="--helix-config needs the path"):
        yaml_config.split(["--helix-config"])
    assert yaml_config.split([f"--helix-config={path}"])[1][0][2] == str(path)


def test_join_checks_against_megatrons_own_parser(tmp_path):
    path = write(tmp_path, "MODEL_ARGS: {num-layers: 2, sequence-parallel: true}\n")
    argv = yaml_config.join(
        *yaml_config.split(["--seed", "1", "--helix-config", str(path), "--num-layers", "3"])
    )
    assert argv == ["--seed", "1", "--num-layers", "2", "--sequence-parallel", "--num-layers", "3"]
    twice = ["--helix-config", str(path), "--seed", "1", "--helix-config", str(path)]
    flags = ["--num-layers", "2", "--sequence-parallel"]
    assert yaml_config.join(*yaml_config.split(twice)) == [*flags, "--seed", "1", *flags]
    path = write(tmp_path, "MODEL_ARGS: {tensor-model-paralel-size: 2}\n")
    with pytest.raises(
        ValueError, match=r"--tensor-model-paralel-size; did you mean --tensor-model-parallel-size\?"
    ):
        yaml_config.join(*yaml_config.split(["--helix-config", str(path)]))


def test_unknown_flags_of_the_command_line():
    yaml_config.check_flags(["--num-layers", "2", "--lr=0.1", "-3"])
    with pytest.raises(ValueError, match=r"no flag --num-layer; did you mean --num-layers\?"):
        yaml_config.check_flags(["--num-layer=2"])
