"""The console script: what `serve` adds on which machine, that commands are found lazily, and that errors are clear."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from sglang_dcp.cli import commands as cli
from sglang_dcp.cli import doctor as cli_doctor
from sglang_dcp.cli import serve as cli_serve
from sglang_dcp.cpu.environment import STAND_IN_FOLDER, bind_ranks_to_cores, cpu_additions

REPOSITORY = Path(__file__).resolve().parents[2]

NO_DRIVER = None


def flags_of(*flags: str, cuda_devices: int | None = NO_DRIVER) -> tuple[str, ...]:
    return cli_serve.plan_launch(flags, {}, cuda_devices=cuda_devices).added_flags


def test_cpu_machine_gets_device_and_backend() -> None:
    assert flags_of("--model-path", "m") == ("--device", "cpu", "--attention-backend", "torch_native")


def test_dyncp_picks_its_own_backend() -> None:
    assert flags_of("--model-path", "m", "--enable-dyncp") == ("--device", "cpu")


def test_flags_that_are_given_stay() -> None:
    assert flags_of("--device", "cpu", "--attention-backend", "x") == ()
    assert flags_of("--device=cpu", "--attention-backend=x") == ()
    launch = cli_serve.plan_launch(["--device", "cpu", "--foo", "--bar=1"], {}, cuda_devices=NO_DRIVER)
    assert launch.flags[:4] == ("--device", "cpu", "--foo", "--bar=1")


def test_a_decode_server_on_a_cpu_gets_what_it_lacks() -> None:
    added = ("--no-enable-tp-lm-head-all-to-all", "--disaggregation-decode-retraction-backup", "cpu_tensor")
    assert flags_of("--device", "cpu", "--enable-dyncp", "--disaggregation-mode", "decode") == added
    assert flags_of("--device", "cpu", "--enable-dyncp", "--disaggregation-mode=decode", "--enable-tp-lm-head-all-to-all") == added[1:]
    given = ("--device", "cpu", "--enable-dyncp", "--disaggregation-mode", "decode", "--disaggregation-decode-retraction-backup", "x")
    assert flags_of(*given) == added[:1]
    assert flags_of("--disaggregation-mode", "decode", cuda_devices=1) == ()
    early = "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"
    for mode, value in (("prefill", "0"), ("decode", None)):
        assert cli_serve.plan_launch(["--disaggregation-mode", mode], {}, cuda_devices=NO_DRIVER).additions.get(early) == value
    assert early not in cli_serve.plan_launch(["--disaggregation-mode", "prefill"], {early: "1"}, cuda_devices=NO_DRIVER).additions


def test_a_config_file_counts_like_flags(tmp_path: Path) -> None:
    """SGLang merges it later; what a CPU machine needs is decided here."""
    path = tmp_path / "server.yaml"
    path.write_text(
        "model-path: m\ntp: 4\nenable-dyncp: true\nskip-server-warmup: false\ndyncp-max-degree: 2\ncuda-graph-bs-decode: [1, 2]\n"
    )
    launch = cli_serve.plan_launch(["--config", str(path), "--port", "1"], {}, cuda_devices=NO_DRIVER)
    assert launch.flags == ("--config", str(path), "--port", "1", "--device", "cpu")
    assert len(launch.additions["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 4
    launch = cli_serve.plan_launch(["--tp", "2", "--config", str(path)], {}, cuda_devices=NO_DRIVER)
    assert len(launch.additions["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 2, "the command line has the last word"


@pytest.mark.parametrize("text", ["- tp\n", "tp: [", "", None])
def test_a_config_file_that_is_none_is_sglangs_to_refuse(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "server.yaml"
    if text is not None:
        path.write_text(text)
    assert flags_of("--config", str(path), "--enable-dyncp") == ("--device", "cpu")


def test_a_model_may_stand_first_as_behind_sglang_serve() -> None:
    assert cli_serve.name_model(["m", "--tp", "2"]) == ["--model-path", "m", "--tp", "2"]
    assert cli_serve.name_model(["--tp", "2"]) == ["--tp", "2"]
    assert cli_serve.name_model([]) == []


@pytest.mark.parametrize("flag", ["--tp", "--tp-size", "--tensor-parallel-size"])
def test_one_core_per_rank(flag: str) -> None:
    for arguments in ([flag, "5"], [f"{flag}=5"]):
        additions = cli_serve.plan_launch(arguments, {}, cuda_devices=NO_DRIVER).additions
        assert len(additions["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 5


def test_gpu_machine_is_left_alone() -> None:
    launch = cli_serve.plan_launch(["--model-path", "m", "--enable-dyncp"], {}, cuda_devices=8)
    assert launch == cli_serve.Launch(("--model-path", "m", "--enable-dyncp"), {}, ())
    assert cli_serve.describe(launch) == []


def test_stand_in_never_on_a_machine_with_a_driver() -> None:
    for devices in (0, 1):
        additions = cli_serve.plan_launch(["--device", "cpu"], {}, cuda_devices=devices).additions
        assert "PYTHONPATH" not in additions
        assert additions["SGLANG_USE_CPU_ENGINE"] == "1"


def test_everything_added_is_told() -> None:
    launch = cli_serve.plan_launch(["--tp", "2"], {}, cuda_devices=NO_DRIVER)
    told = "\n".join(cli_serve.describe(launch))
    assert all(f"{name}={value}" in told for name, value in launch.additions.items())
    assert all(flag in told for flag in launch.added_flags)


def test_environment_of_the_user_stays() -> None:
    current = {"SGLANG_CPU_OMP_THREADS_BIND": "7", "OMP_NUM_THREADS": "3", "PYTHONPATH": "/a:/b"}
    additions = cpu_additions(2, current, has_cuda_driver=False)
    assert additions == {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": f"{STAND_IN_FOLDER}:/a:/b"}
    again = cpu_additions(2, current | additions, has_cuda_driver=False)
    assert again["PYTHONPATH"] == additions["PYTHONPATH"], "repeating it adds nothing"


def test_ranks_share_cores_in_turn() -> None:
    assert bind_ranks_to_cores(4, [0, 1]) == "0|1|0|1"
    assert bind_ranks_to_cores(2, [4, 5, 6]) == "4|5"
    for ranks, cores in ((0, [0]), (-1, [0]), (2, [])):
        with pytest.raises(ValueError, match="cannot bind"):
            bind_ranks_to_cores(ranks, cores)


@pytest.mark.parametrize("value", ["0", "-2", "two", "1.5"])
def test_senseless_tp_is_refused_by_name(value: str) -> None:
    with pytest.raises(SystemExit, match="tp"):
        cli_serve.plan_launch([f"--tp={value}"], {}, cuda_devices=NO_DRIVER)


def test_serve_help_lists_our_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--enable-dyncp" in text
    assert "--dyncp-policy" in text


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command.name in text for command in cli.COMMANDS)


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sevre"]) == 2
    assert "unknown command 'sevre'" in capsys.readouterr().err
    assert cli.main([]) == 2


def test_missing_module_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("top", "sglang_dcp.no_such_module", ""),))
    assert cli.main(["top"]) == 1
    assert "does not contain sglang_dcp.no_such_module" in capsys.readouterr().err


def test_command_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("dyncp_fake_command")
    module.add_arguments = lambda parser: parser.add_argument("id")
    module.run = lambda args: 7 if args.id == "abc" else 1
    monkeypatch.setitem(sys.modules, "dyncp_fake_command", module)
    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("requests", "dyncp_fake_command", ""),))
    assert cli.main(["requests", "abc"]) == 7


def test_a_reader_that_has_enough_is_no_error() -> None:
    """`sglang-dcp plan ... | head -3` is how people look at a long answer."""
    command = [sys.executable, "-m", "sglang_dcp.cli.commands", "plan", "--load", "docs/examples/load.json", "--prompt", "2000"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=120)) == ("", 128 + signal.SIGPIPE)


def test_help_imports_neither_torch_nor_sglang() -> None:
    code = "import sys; from sglang_dcp.cli.commands import main; main(['serve', '--help'])"
    code += "; print(sorted({'torch', 'sglang'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_doctor_fails_by_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["doctor", "--no-hooks", "--port", str(port)]) == 1
    assert f"FAIL  port: {port}" in capsys.readouterr().out
    monkeypatch.setattr(cli_doctor, "pinned_sglang_version", lambda: "0.0.1")
    assert cli.main(["doctor", "--no-hooks", "--port", "0"]) == 1
    assert "FAIL  sglang: " in capsys.readouterr().out


def test_doctor_notices_a_plugin_that_is_left_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    assert cli.main(["doctor", "--no-hooks", "--port", "0"]) == 1
    assert "leaves sglang_dcp out" in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("UPSTREAM_VERSION"), reason="needs the repository")
def test_pin_is_the_same_everywhere() -> None:
    with open("UPSTREAM_VERSION") as file:
        assert file.read().strip() == cli_doctor.pinned_sglang_version()


@pytest.mark.parametrize(("capabilities", "ok"), [([(9, 0), (9, 0)], True), ([(9, 0), (8, 0)], False), ([(10, 0)], False)])
def test_doctor_names_a_card_that_is_not_served(monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]], ok: bool) -> None:
    monkeypatch.setattr(cli_doctor, "count_cuda_devices", lambda: len(capabilities))
    monkeypatch.setattr(cli_doctor, "cuda_capabilities", lambda: capabilities)
    finding = cli_doctor._device()
    assert finding.ok is ok
    assert ok or f"{capabilities[-1][0]}.{capabilities[-1][1]}: --enable-dyncp needs Hopper" in finding.detail


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        (
            "plan --load docs/examples/load.json --prompt 9 --expected-new -1",
            "--expected-new: must be a whole number of at least 0, got -1",
        ),
        ("plan --load docs/examples/load.json --prompt 9 --pool-tokens 0", "--pool-tokens: must be a whole number of at least 1, got 0"),
        ("plan --trace docs/examples/trace.csv --policy nope", "--policy: invalid choice: 'nope' (choose from 'dual-balance',"),
        ("plan --trace docs/examples/trace.csv --pool-tokens -1", "--pool-tokens: must be a whole number of at least 1, got -1"),
        ("plan --trace docs/examples/trace.csv --max-new -1", "--max-new: must be a whole number of at least 0, got -1"),
        ("calibrate --max-error nan", "--max-error: must be a number above 0, got nan"),
        ("calibrate --limit nan", "--limit: must be a number above 0, got nan"),
        ("top --interval -1", "--interval: must be a number above 0, got -1"),
        ("requests --last -1", "--last: must be a whole number of at least 1, got -1"),
        ("requests --last x", "--last: must be a whole number of at least 1, got x"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_flag(line: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    assert end.value.code == 2 and flag in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--config c.json", "--config c.json has no effect without --measure"),
        ("--kv-dtype fp8_e4m3", "--kv-dtype fp8_e4m3 has no effect without --measure"),
        ("--attention-backend fa3", "--attention-backend fa3 has no effect without --measure"),
        ("--limit 5", "--limit 5.0 has no effect without --measure"),
        ("--model nobody", "no row of --model nobody; it has deepseek-v3"),
        ("--model deepseek-v3 --out /dev/null --base nobody", "cost model 'nobody': no such file; known names: cpu, "),
        ("--model deepseek-v3 --out /dev/null --base docs/examples/load.json", "cost model docs/examples/load.json: key"),
    ],
)
def test_a_fit_says_what_it_cannot_use(line: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert cli.main(["calibrate", *line.split()]) == 2
    assert told in capsys.readouterr().err
