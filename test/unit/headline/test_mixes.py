"""Which mixes, rates and seeds a call of the comparison measures, in which order, on which servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmark.headline.contenders import FA3, contenders, pinned
from benchmark.headline.plan import MixRates, Unit, is_left, parse_mixes, parse_seeds, units
from benchmark.headline.run import load_or_begin, parse
from benchmark.headline.traffic import mix_name, mix_title
from testing.gpu.servers import GpuServer


def test_every_mix_has_its_rates() -> None:
    assert parse_mixes("0.03,0", "6,4/8,12") == [MixRates(0.03, (4.0, 6.0)), MixRates(0.0, (8.0, 12.0))]
    assert parse_mixes("0.01,weka", "4") == [MixRates(0.01, (4.0,)), MixRates("weka", (4.0,))]
    assert [mix_name(mix) for mix in (0.03, 0.0, "weka")] == ["0.03", "0", "weka"]
    assert mix_title("0.03") == "3 % long prompts" and "Weka" in mix_title("weka")


@pytest.mark.parametrize(
    ("mixes", "rates"), [("0.03", "4/6"), ("0,0.01,0.03", "4/6"), ("x", "4"), ("0.03", "4,"), ("1.5", "4"), ("-0.1", "4"), ("nan", "4")]
)
def test_lists_that_do_not_fit_are_refused(mixes: str, rates: str) -> None:
    with pytest.raises(ValueError):
        parse_mixes(mixes, rates)


def test_seeds_are_each_there_once() -> None:
    assert parse_seeds("2,1") == [2, 1]
    for wrong in ("1,1", "", "1,"):
        with pytest.raises(ValueError):
            parse_seeds(wrong)


def groups(names: str, *flags: str) -> list[list[str]]:
    return [[one.name for one in some] for some in parse(["out", "--contenders", names, *flags]).groups]


def test_contenders_of_equal_flags_share_a_server() -> None:
    assert groups("stock,whole,length-buckets,ours,fixed-2") == [["stock"], ["whole", "ours", "fixed-2"], ["length-buckets"]]
    assert groups("ours,whole-only,ours-flashinfer") == [["ours"], ["whole-only"], ["ours-flashinfer"]]
    # With prompts that are computed, all run SGLang's default kernel.
    assert groups("stock,ours,whole", "--real-prefill") == [["stock"], ["ours", "whole"]]


def test_unknown_contenders_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["out", "--contenders", "ours,theirs"])
    assert "theirs" in capsys.readouterr().err


def test_pins_join_the_fields_that_all_have() -> None:
    known = contenders(2)
    assert known["whole"].fields == {"bootstrap_host": "2.2.2.2", **pinned(1)} and known["fixed-2"].fields["sampling_params"] == {
        "custom_params": {"dyncp": {"degree": 2, "at_most": True}}
    }
    assert "sampling_params" not in known["ours"].fields and "fixed-4" in contenders(4)


def test_real_prefill_drops_what_skips_it_and_nothing_else() -> None:
    fake, real = contenders(2), contenders(2, "real")
    for name, one in real.items():
        assert "--disaggregation-mode" not in one.flags and "bootstrap_host" not in one.fields, name
        assert one.flags.count("--attention-backend") == 1 and (FA3[1] in one.flags) == (name != "ours-flashinfer"), name
        kept = set(fake[name].flags) - {"--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "fake"}
        assert kept - {"--disaggregation-decode-retraction-backup", "cpu_tensor"} <= set(one.flags), name
    assert real["whole"].fields == pinned(1)


def test_prompts_that_are_computed_come_in_sglangs_own_chunks() -> None:
    def command(chunk_tokens: int | None) -> list[str]:
        return GpuServer("x", Path("model"), 2, 8000, True, chunk_tokens=chunk_tokens).command()

    assert "--chunked-prefill-size" not in command(0)
    for chunk_tokens, expected in ((None, "2000"), (65_536, "131072")):
        found = command(chunk_tokens)
        assert found[found.index("--chunked-prefill-size") + 1] == expected


def test_all_contenders_of_a_server_are_measured_at_a_rate_before_the_next() -> None:
    known = contenders(2)
    order = units([known["ours"], known["whole"]], parse_mixes("0.03,0", "4,6/8"), [1, 2])
    assert [(unit.case_key, unit.rate, unit.contender.name) for unit in order[:6]] == [
        ("0.03|1", 4.0, "ours"),
        ("0.03|1", 4.0, "whole"),
        ("0.03|1", 6.0, "ours"),
        ("0.03|1", 6.0, "whole"),
        ("0.03|2", 4.0, "ours"),
        ("0.03|2", 4.0, "whole"),
    ]
    assert len(order) == len({(unit.case_key, unit.rate, unit.contender.name) for unit in order}) == 12


def test_what_is_measured_and_what_was_too_much_is_not_left() -> None:
    def point(rate: float, p99: float, ttft: float = 0.1, failed: dict[str, int] | None = None) -> dict[str, Any]:
        return {"requests_per_s": rate, "p99_tpot_ms": p99, "p99_ttft_s": ttft, "failed": failed or {}}

    ours = contenders(2)["ours"]

    def left(points: list[dict[str, Any]], rate: float) -> bool:
        return is_left({"0.03|1": {"ours": {"points": points}}}, Unit(ours, 0.03, 1, rate), 150.0, 15.0)

    assert left([], 4.0) and not left([point(4, 10.0)], 4.0) and left([point(4, 10.0)], 6.0)
    assert not left([point(4, 151.0)], 6.0) and left([point(4, 151.0)], 2.0)
    assert not left([point(4, 10.0, ttft=16.0)], 6.0) and not left([point(4, 10.0, failed={"x": 1})], 6.0)
    assert is_left({}, Unit(ours, "weka", 1, 1.0), 150.0, 15.0)


def test_a_file_of_other_facts_is_not_continued(tmp_path: Path) -> None:
    args = parse([str(tmp_path), "--dry", "--commit", "abc"])
    path = tmp_path / "headline.json"
    begun = load_or_begin(path, args)
    assert begun["prefill"] == "none" and begun["cases"] == {} and begun["commit"] == "abc" and "earlier_commands" not in begun
    path.write_text('{"cases": {"0.03|1": {}}, "command": "before", "prefill": "real"}')
    with pytest.raises(ValueError, match=r"headline.json: model is None there"):
        load_or_begin(path, args)
