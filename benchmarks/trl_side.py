"""The other side of `post_training.py`: TRL's trainers and peft. Knows nothing of Mujina.

    python -m benchmarks.trl_side JOB.json…        (each with a folder JOB beside it, for what is found)

A job gives the model's folder, the rows of tokens of every step, the learning rates, the constants of AdamW and further options. The
trainers are stock; subclasses hand them these steps and rates in the place of a set to be shuffled and of a schedule. The folder gets
steps.json (what the trainer logs of each step), gradient.safetensors (of the first step, clipped) and with an adapter logits.safetensors.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.turns import Turns

MODULES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
COMMON = dict(
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    logging_steps=1,
    logging_nan_inf_filter=False,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)


class InGivenSteps:
    """A trainer that takes the steps and the learning rates of a job."""

    job: dict[str, Any]

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:  # it is tokens already
        return dataset

    def get_train_dataloader(self) -> DataLoader:
        rows = iter(range(len(self.train_dataset)))
        steps = [[next(rows) for _ in step] for step in self.job["steps"]]
        return DataLoader(self.train_dataset, batch_sampler=steps, collate_fn=self.data_collator)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        rates = [*self.job["learning_rates"], 0.0]  # it is asked for one behind the last step
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, lambda step: rates[step] / max(rates))
        return self.lr_scheduler


class GivenSFT(InGivenSteps, SFTTrainer):
    pass


class GivenDPO(InGivenSteps, DPOTrainer):
    pass


class GivenDPOByPair(GivenDPO):
    """Each pair as a batch of its own."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> torch.Tensor:
        num_pairs = len(inputs["input_ids"]) // 2
        pairs = [{name: values[[n, n + num_pairs]] for name, values in inputs.items()} for n in range(num_pairs)]
        return torch.stack([super(GivenDPOByPair, self)._compute_loss(model, pair, return_outputs) for pair in pairs]).mean()


class FirstGradient(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **_: Any) -> None:
        if state.global_step == 0:
            save_file({name: values.grad.clone() for name, values in model.named_parameters() if values.grad is not None}, self.path)


def run(job: dict[str, Any], folder: Path) -> None:
    adapter, optimizer = job["adapter"], job["optimizer"]
    options = dict(
        output_dir=str(folder),
        max_steps=len(job["steps"]),
        learning_rate=max(job["learning_rates"]),
        weight_decay=optimizer["weight_decay"],
        max_grad_norm=optimizer["clip_grad"],
        adam_beta1=optimizer["beta1"],
        adam_beta2=optimizer["beta2"],
        adam_epsilon=optimizer["epsilon"],
        max_length=None,
        **COMMON,
    )
    given = dict(
        model=adapted(job["model"], adapter, adapter["start"]) if adapter else loaded(job["model"]),
        train_dataset=Dataset.from_list([row for rows in job["steps"] for row in rows]),
        processing_class=some_tokenizer(),
        callbacks=[FirstGradient(folder / "gradient.safetensors")],
    )
    if job["kind"] == "dpo":
        kind = GivenDPOByPair if "aot" in job["options"]["loss_type"] else GivenDPO
        kind.job = job
        trainer = kind(args=DPOConfig(**options, **job["options"]), ref_model=loaded(job["model"]), **given)
    else:
        GivenSFT.job = job
        trainer = GivenSFT(args=SFTConfig(**options, **job["options"]), **given)
    trainer.train()
    (folder / "steps.json").write_text(json.dumps([line for line in trainer.state.log_history if "loss" in line]))
    if adapter:
        merged = adapted(job["model"], adapter, adapter["end"]).merge_and_unload()
        with torch.no_grad():
            save_file({"logits": merged.eval()(torch.tensor(adapter["tokens"])).logits}, folder / "logits.safetensors")


def loaded(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def some_tokenizer() -> PreTrainedTokenizerFast:
    """The trainers want one; all is tokens already."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "</s>": 1})), pad_token="<pad>", eos_token="</s>")


def adapted(folder: str, adapter: dict[str, Any], file: str) -> Any:
    """The model beside an adapter with the values in a file, which have Mujina's names: `layers.3.experts.5.gate.lora_a`."""
    values = load_file(file)
    names = {name.rpartition(".")[0].rpartition(".")[2] for name in values if ".experts." not in name}
    has_experts = any(".experts." in name for name in values)
    rank = adapter["rank"] * (2 if has_experts else 1)
    config = LoraConfig(
        r=rank,
        lora_alpha=adapter["alpha"] * rank / adapter["rank"],
        target_modules=[MODULES[name].rpartition(".")[2] for name in sorted(names)],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"] if has_experts else None,
    )
    model = get_peft_model(loaded(folder), config)
    for number, layer in enumerate(model.base_model.model.model.layers):
        for name in names:
            a, b = (values[f"layers.{number}.{name}.lora_{which}"] for which in "ab")
            write(layer.get_submodule(MODULES[name]), widened(a, 0, rank), widened(b, 1, rank))
        for module in layer.modules():
            if isinstance(module, ParamWrapper):
                write_experts(module, values, f"layers.{number}.experts.", rank)
    return model


def write_experts(wrapper: ParamWrapper, values: dict[str, torch.Tensor], prefix: str, rank: int) -> None:
    """peft's A is [experts × rank, columns], its B [rows, rank × experts] with the experts innermost."""
    is_gate_up, a, b, kept = wrapper.parameter_name == "gate_up_proj", [], [], []
    for expert in range(wrapper.num_experts):
        matrices = [f"{prefix}{expert}.{name}" for name in (("gate", "up") if is_gate_up else ("down",))]
        a.append(widened(torch.cat([values[f"{matrix}.lora_a"] for matrix in matrices]), 0, rank))
        of_each = [values[f"{matrix}.lora_b"] for matrix in matrices]
        b.append(widened(torch.block_diag(*of_each), 1, rank))
        kept.append(widened(torch.block_diag(*map(torch.ones_like, of_each)), 1, rank))
    b_all, kept_all = (torch.stack(each).permute(1, 2, 0).flatten(1) for each in (b, kept))
    write(wrapper, torch.cat(a), b_all)
    wrapper.lora_B["default"].weight.register_hook(lambda gradient: gradient * kept_all)


def write(module: Any, a: torch.Tensor, b: torch.Tensor) -> None:
    with torch.no_grad():
        for matrix, values in ((module.lora_A["default"].weight, a), (module.lora_B["default"].weight, b)):
            assert matrix.shape == values.shape
            matrix.copy_(values)


def widened(values: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """With zeros, which stay: where A has them B gets no gradient, and the other way round."""
    shape = list(values.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([values, values.new_zeros(shape)], dim)


class TakesTurns(TrainerCallback):
    def __init__(self) -> None:
        self.turns = Turns()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.turns.step_is_done()


def in_turns(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """A stock SFTTrainer, a step a turn: the tokens of each, and the highest resident memory."""
    model, turns = job["model"], TakesTurns()
    sizes = dict(
        vocab_size=model["vocab_size"],
        hidden_size=model["hidden_size"],
        intermediate_size=model["ffn_hidden_size"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_attention_heads"],
        num_key_value_heads=model["num_query_groups"],
    )
    config = SFTConfig(
        output_dir=folder, max_steps=job["max_steps"], **COMMON, **job["options"], learning_rate=1e-4, lr_scheduler_type="constant"
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa")),
        args=config,
        train_dataset=Dataset.from_list(job["rows"]),
        processing_class=some_tokenizer(),
        callbacks=[turns],
    )
    trainer.train()
    seen = [0, *(line["num_tokens"] for line in trainer.state.log_history if "loss" in line)]
    return {"tokens": [after - before for before, after in zip(seen, seen[1:], strict=False)], "peak_bytes": turns.turns.peak_bytes}


if __name__ == "__main__":
    if sys.argv[1] == "--in-turns":
        with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
            found = in_turns(json.loads(Path(sys.argv[2]).read_text()), name)
        print(json.dumps(found))
    else:
        torch.set_num_threads(1)
        for path in map(Path, sys.argv[1:]):
            path.with_suffix("").mkdir(exist_ok=True)
            run(json.loads(path.read_text()), path.with_suffix(""))
