"""What each run is and how far it has come, in one table; its configuration below."""

import math
import statistics
from collections import Counter
from collections.abc import Callable
from html import escape

from evaluation.report.charts import short
from evaluation.report.inputs import Inputs
from evaluation.report.runs import Run
from mujina.page import swatch


def section(inputs: Inputs) -> str:
    runs = inputs.runs
    heads = "".join(f'<th class="run">{swatch(run.colour, run.name)}</th>' for run in runs)
    facts = [_facts(run) for run in runs]
    rows = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(fact[name])}</td>' for fact in facts)}</tr>"
        for name in facts[0]
        if any(fact[name] != "–" for fact in facts)
    )
    configs = "".join(
        f"<details><summary>Configuration of {escape(run.name)}</summary><pre>{escape(run.config_text)}</pre></details>" for run in runs
    )
    return f'<div class="panel"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{configs}'


def _facts(run: Run) -> dict[str, str]:
    model, moe, last = run.config.model, run.config.moe, run.steps[-1]
    end = [step.loss for step in run.steps[-run.window :] if math.isfinite(step.loss)]
    over = f" (mean of the last {run.window} steps)" if run.window > 1 else ""
    num_broken = sum(not math.isfinite(step.loss) for step in run.steps)
    return {
        "Model": f"{model.num_layers} layers × {model.hidden_size:,} hidden, FFN {model.ffn_hidden_size:,}",
        "Attention": f"{model.num_attention_heads} heads, {model.num_query_groups} query groups",
        "Vocabulary": f"{model.vocab_size:,}",
        "Experts": f"{moe.num_experts} in each {'layer' if moe.every == 1 else f'{moe.every} layers'}, top {moe.top_k}" if moe else "–",
        "Parallel": ", ".join(f"{dimension} {size}" for dimension, size in run.config.parallel.items() if size > 1) or "–",
        "Weights from": run.config.train.init_from or (moe and moe.upcycle_from and f"{moe.upcycle_from}, upcycled") or "–",
        "Steps": f"{last.step:,}",
        "Tokens": f"{last.tokens:,} of {sum(phase.tokens for phase in run.config.phases):,} planned",
        "Time in steps": _duration(sum(step.seconds for step in run.steps)),
        "Tokens per second": f"{short(statistics.median(step.tokens_per_second for step in run.steps))} (median)",
        "Model TFLOP/s per GPU": _median(run, "tflops_per_gpu", short),
        "MFU": _median(run, "mfu", "{:.1%}".format),
        "Checkpoints": _saves(run),
        "Events": ", ".join(f"{count} × {what}" for what, count in Counter(event.what for event in run.events).items()) or "–",
        "Loss at the end": f"{statistics.mean(end):.3f}{over}" if end else "not finite",
        "Steps without a finite loss": f"{num_broken:,}" if num_broken else "–",
        "Lines lost from metrics.jsonl": f"steps {run.lost}" if run.lost else "–",
        "Left out": "; ".join(run.left_out) or "–",
    }


def _median(run: Run, field: str, shown: Callable[[float], str]) -> str:
    values = [value for step in run.steps if (value := getattr(step, field)) is not None]
    return f"{shown(statistics.median(values))} (median)" if values else "–"


def _saves(run: Run) -> str:
    facts = [save.model_extra for save in run.saves if save.model_extra and {"seconds", "whole_seconds"} <= save.model_extra.keys()]
    if not facts:
        return "–"
    still, whole = (statistics.median(fact[key] for fact in facts) for key in ("seconds", "whole_seconds"))
    return f"{len(facts)}: training stood still for {still:.2f} s, whole after {whole:.2f} s (medians)"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
