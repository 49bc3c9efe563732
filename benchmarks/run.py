"""Measuring a case: its rows for the CSV file and its table on the screen."""

from dataclasses import asdict
from functools import cache

from benchmarks.case import Case, Op, ready
from benchmarks.limits import Limits
from benchmarks.measure import held_bytes, interleave, peak_bytes, quantile, ratio
from benchmarks.records import Row

MIB = 2**20


class LimitsOf:
    """The limits that a user gives, or else those measured once for each device and dtype."""

    def __init__(self, tflops: float | None = None, tbps: float | None = None) -> None:
        self.tflops, self.tbps = tflops, tbps
        self._measured = cache(Limits.measured)

    def __call__(self, case: Case) -> Limits:
        if self.tflops and self.tbps:
            return Limits(1e12 * self.tflops, 1e12 * self.tbps)
        found = self._measured(case.device, case.torch_dtype)
        return Limits(
            1e12 * self.tflops if self.tflops else found.flops, 1e12 * self.tbps if self.tbps else found.bandwidth
        )


def measure_case(
    op: Op,
    case: Case,
    *,
    passes: list[str],
    rounds: int,
    limits: Limits,
    wanted: list[str] | None = None,
    base: str = "",
) -> tuple[list[Row], dict[str, str]]:
    """One row per pass and variant, and the reasons of the variants that were left out.

    base: the variant that speed-ups are over, if not the operation's own.
    """
    variants, skipped = ready(op, case, wanted)
    base = base or op.base
    rows: list[Row] = []
    for pass_ in (name for name in op.passes if name in passes):
        able = {name: variant for name, variant in variants.items() if variant.able(pass_)}
        times = interleave(able, pass_, rounds, case.device)
        work = op.work_of(case, pass_)
        least = limits.milliseconds(work)
        for name, taken in times.items():
            row: Row = asdict(case) | {"pass": pass_, "variant": name, "rounds": rounds}
            del row["device"]  # the environment names it
            row |= {f"p{share}_ms": round(quantile(taken, share / 100), 4) for share in (20, 50, 80)}
            row["peak_mib"] = round(peak_bytes(able[name], pass_, case.device) / MIB, 4)
            row["held_mib"] = round(held_bytes(able[name].holds) / MIB, 4)
            row |= {"base": base, "speedup": round(ratio(times[base], taken), 3) if base in times else ""}
            row |= {"gflop": round(work.flops / 1e9, 4), "mbyte": round(work.bytes / 1e6, 4)}
            row |= {"limit_ms": round(least, 4), "share_of_limit": round(least / quantile(taken, 0.5), 3)}
            rows.append(row)
    return rows, skipped


def overview(op: Op, rows: list[dict[str, str]]) -> str:
    """One line a case of rows read from a file: its variants in the operation's last pass, the newest of each."""
    newest: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["pass"] == op.passes[-1]:
            case = tuple(row[name] for name in ("model", "part", "tokens", "rank", "dtype", "keep"))
            newest.setdefault(case, {})[row["variant"]] = row
    lines = []
    for (model, part, tokens, rank, dtype, keep), variants in newest.items():
        shown = [
            f"{name} {float(row['p50_ms']):.3f} ms {row['speedup'] or '-'}x {float(row['share_of_limit']):.0%} "
            f"{float(row['peak_mib']):.0f}+{float(row['held_mib']):.0f} MiB"
            for name, row in variants.items()
        ]
        gates = "/".join(sorted({row["gate"] for row in variants.values()}))
        where = f"{op.name} {model} {part} M {tokens} r {rank} {dtype} keep {keep}, {gates}"
        lines.append(f"{where}\n    {' | '.join(shown)}\n")
    return "".join(lines)


def table(case: Case, rows: list[Row], skipped: dict[str, str]) -> str:
    """The rows of one case for a reader."""
    lines = [str(case)]
    for row in rows:
        faster = f"{row['speedup']:6.2f}x" if row["speedup"] != "" else " " * 7
        lines.append(
            f"  {row['pass']:<8} {row['variant']:<15} p50 {row['p50_ms']:10.3f} ms  [{row['p20_ms']:.3f}, "
            f"{row['p80_ms']:.3f}] {faster}  peak {row['peak_mib']:9.1f} MiB  {row['gflop']:.4g} GFLOP "
            f"{row['mbyte']:.4g} MB  {row['share_of_limit']:6.1%} of the limit"
        )
    return "\n".join(lines + [f"  {name} left out: {reason}" for name, reason in skipped.items()])
