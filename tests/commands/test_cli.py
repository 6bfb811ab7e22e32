import json
import subprocess
import sys

import pytest

from fastseg import dispatch
from fastseg.commands import cli


def fastseg(*arguments):
    run = subprocess.run([sys.executable, "-m", "fastseg", *arguments], capture_output=True, text=True)
    return run.returncode, run.stdout, run.stderr


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and f"fastseg {command}" in text.partition("example")[2]


def test_without_a_command_the_help_is_printed_and_the_exit_code_is_2(capsys):
    assert cli.main([]) == 2
    assert "doctor" in capsys.readouterr().out


def test_bad_input_is_reported_in_one_line_with_exit_code_2(tmp_path):
    missing = str(tmp_path / "nothing.pt")
    code, out, err = fastseg("segment", "image.png", "--checkpoint", missing)
    assert code == 2 and out == "" and missing in err and "Traceback" not in err and len(err.splitlines()) == 1
    code, _, err = fastseg("segment", "image.png", "--checkpoint", missing, "--debug")
    assert code != 0 and "Traceback" in err


def test_doctor_reports_versions_and_the_backend(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] and facts["backend setting"] == "auto"
    assert cli.main(["doctor"]) == 0
    assert facts["packages"]["torch"] in capsys.readouterr().out


def test_no_kernel_is_loaded_before_a_command_runs():
    """verify and inspect choose whether kernels are interpreted, which must happen before triton is imported."""
    code = "import sys, fastseg.commands.cli as c; c.parser(); print('triton' in sys.modules, 'cupy' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False False", run.stdout + run.stderr


def test_an_invalid_environment_variable_is_reported_in_one_line(monkeypatch):
    monkeypatch.setenv("FASTSEG_BACKEND", "fast")
    code, out, err = fastseg("doctor")
    assert code == 2 and out == "" and "FASTSEG_BACKEND is 'fast'" in err and len(err.splitlines()) == 1


def test_a_bug_is_reported_with_exit_code_1_and_without_traceback(monkeypatch, capsys):
    from fastseg.commands import doctor

    def broken():
        raise KeyError("gpu")

    monkeypatch.setattr(doctor, "facts", broken)
    assert cli.main(["doctor"]) == 1
    assert "KeyError: 'gpu'" in capsys.readouterr().err


def test_verify_sets_the_interpreter_by_itself(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, out, err = fastseg("verify", "--quick", "--op", "cross_entropy", "--dtype", "float32")
    assert code == 0 and "0 failed results" in out and "Warning" not in err, err


def test_the_error_for_a_missing_file_has_its_name(capsys):
    assert cli.main(["bench", "compare", "old.jsonl", "new.jsonl"]) == 2
    assert capsys.readouterr().err == "fastseg bench: error: old.jsonl: No such file or directory\n"


def test_verify_checks_the_cpu_kernels(capsys, monkeypatch):
    words = ["verify", "--quick", "--op", "max_pool2d", "--dtype", "float32", "--backend", "cpu"]
    if dispatch.without_cpu_kernels() is None:
        assert cli.main(words) == 0
        printed = capsys.readouterr().out
        assert "on the CPU, seed" in printed and "0 failed results" in printed
    monkeypatch.setattr(dispatch, "without_cpu_kernels", lambda: "there is no C++ compiler")
    assert cli.main(words) == 2
    assert "--backend cpu cannot run: there is no C++ compiler" in capsys.readouterr().err
