"""Check that exported files are the trained policy: logits, tokens, stops and adherence to budgets. Writes nothing.

The reference is the trained policy, base and adapter as in training, on questions of the run's own task. One model is in memory at a
time, beside the logits of the others.
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import torch
from torch import nn

from sbtiny.budget.protocol import render_budget
from sbtiny.evaluation.evaluate import sample_with_progress, score_answer, with_max_tokens, with_seeds
from sbtiny.export import verdict
from sbtiny.export.compare import answer_logits, comparison_texts, distance, in_float32, kl, logit_fn
from sbtiny.export.config import ExportConfig
from sbtiny.export.strings import STRINGS
from sbtiny.models.chat_template import render_chat
from sbtiny.models.gguf import find_dropped_feature, read_gguf
from sbtiny.models.load import load_model
from sbtiny.models.prompt import prompt_ids, rendered, to_messages
from sbtiny.rollout.engines import llama_cpp
from sbtiny.rollout.episode import Episode, Sampling
from sbtiny.rollout.load_policy import build_gguf_policy, build_policy
from sbtiny.rollout.policy import Policy
from sbtiny.tasks.sources import Question
from sbtiny.tasks.verify import Verifier

if TYPE_CHECKING:
    from llama_cpp import Llama
    from transformers import PreTrainedTokenizerBase

CHAT_COUNT = 20
MIN_KL_RATIO = 20  # least (KL merged to base) / (KL policy to merged)
CONTEXT = 4096  # tokens of a chat
SAMPLERS_OFF = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}  # llama-cpp-python's own defaults change the distribution


class Check:
    """Compare one export with the trained policy.

    `result` goes into export.json. `failures`: reasons not to use the export. `unread`: files that no installed program can read.
    `composes`: the tokenizer composes text (NFC). llama.cpp does not, so its texts are composed here first; the README says so to users.
    """

    def __init__(self, plan: ExportConfig, questions: Sequence[Question], verify: Verifier, composes: bool = False) -> None:
        self.plan, self.questions, self.verify, self.e, self.composes = plan, questions, verify, plan.settings.eval, composes
        self.chats = questions[:CHAT_COUNT]
        self.failures: list[str] = []
        self.unread: list[str] = []
        self.result: dict[str, Any] = {"questions": len(questions), "temperature": self.e.temperature, "seed": plan.settings.seed}

    @property
    def passed(self) -> bool | None:
        """None: not known, because nothing was measured or a file could not be read."""
        return False if self.failures else True if "trained" in self.result and not self.unread else None

    def measure(self, folder: Path, files: dict[str, Path]) -> None:
        """Measure the trained policy, then the merged folder in `folder`, then the GGUF files by kind."""
        self.measure_policy()
        self.measure_merged(folder / "merged")
        for kind, file in files.items():
            self.measure_gguf(file, kind)

    def measure_policy(self) -> None:
        """Sample answers and logits of the trained policy, the reference of all other measurements."""
        name = self.plan.source.name if self.plan.source.kind == "bundled" else self.plan.source.ref
        model, tokenizer = load_model(
            name, four_bit=self.plan.nf4, dtype=self.plan.trained_in, adapter=self.plan.run / "adapter", backend="transformers"
        )
        in_float32(model)
        policy = self._policy(model, tokenizer)
        self.e = with_max_tokens(policy, self.questions, self.e, self.plan.settings.seed)
        episodes = self._ask(policy, "asking the trained policy")
        self.samples = comparison_texts(episodes, model.get_input_embeddings().weight.shape[0])
        self.policy_logits = answer_logits(logit_fn(model), self.samples)
        with model.disable_adapter():
            self.base_logits = answer_logits(logit_fn(model), self.samples)
        self.prompts = self._prompts(tokenizer)
        self.ids = [tokenizer.encode(text, add_special_tokens=False) for text in STRINGS]
        self.unquantised = self._evaluate(episodes)
        self.result["trained"] = self.unquantised.figures
        self.result["compared"] = {"answers": len(self.samples), "positions": len(self.policy_logits)}

    def measure_merged(self, folder: Path) -> None:
        model, tokenizer = load_model(str(folder), dtype="float32", backend="transformers")
        self.merged_logits = answer_logits(logit_fn(model), self.samples)
        agreement = distance(self.policy_logits, self.merged_logits)
        near, far = agreement.pop("kl"), kl(self.merged_logits, self.base_logits)
        self.result["merged"] = {"dtype": self.plan.dtype, "kl_adapter_merged": near, "kl_merged_base": far, **agreement}
        del self.base_logits, self.policy_logits
        if far < MIN_KL_RATIO * near and self.plan.merge == "dequantized":
            distances = f"{near:.2g} from the policy, {far:.2g} from its base"
            self.failures.append(f"merged weights are {distances}: less than {MIN_KL_RATIO} times nearer")
        if self._prompts(tokenizer) != self.prompts:
            self.failures.append("the merged folder's chat template gives other prompt ids than training")

    # ---- a GGUF file ---------------------------------------------------------------------------------------------------------------

    def measure_gguf(self, file: Path, kind: str) -> None:
        """Measure one GGUF file in every program that can read it; add to `result`, `failures` and `unread`."""
        from gguf import GGUFReader

        report: dict[str, Any] = {"kind": kind, "bytes": file.stat().st_size}
        self.result.setdefault("files", {})[file.name] = report
        dropped = find_dropped_feature(GGUFReader(file))
        report["transformers"] = None if dropped else self._through_transformers(file, kind)
        report["llama_cpp"] = self._through_llama_cpp(file, kind) if llama_cpp.is_available() else None
        report["checked"] = bool(report["transformers"] or report["llama_cpp"])
        if not report["checked"]:
            self.unread.append(f"{file.name} has {dropped}, which only llama.cpp reads: pip install 'sbtiny[llama]' and export again")
        for reader in ("transformers", "llama_cpp"):
            if report[reader]:
                reasons = verdict.find_failures(kind, report[reader], len(self.prompts), self._min_chats_ended())
                self.failures += [f"{file.name} in {reader}: {reason}" for reason in reasons]

    def _through_transformers(self, file: Path, kind: str) -> dict[str, Any]:
        model, tokenizer = read_gguf(file)
        model = model.float()
        found = distance(self.merged_logits, answer_logits(logit_fn(model), self.samples))
        found["strings_same"] = count_same((tokenizer.encode(text, add_special_tokens=False) for text in STRINGS), self.ids)
        found["prompts_same"] = count_same(self._prompts(tokenizer), self.prompts)
        if llama_cpp.is_available():  # it answers faster, so sample there alone
            return found
        return found | self._answers(self._policy(model, tokenizer), file, kind)

    def _through_llama_cpp(self, file: Path, kind: str) -> dict[str, Any]:
        policy = build_gguf_policy(file, self.e.max_num_seqs, self.plan.settings.kv_cache_gib)
        engine = policy.engine
        scored = answer_logits(lambda ids: torch.from_numpy(engine.score(ids)), self.samples)
        found: dict[str, Any] = distance(self.merged_logits, scored)
        texts = [self._composed(text) for text in STRINGS]
        found["strings_same"] = count_same(map(engine.tokenize, texts), self.ids)
        found["strings_composed_first"] = sum(text != string for text, string in zip(texts, STRINGS, strict=True))
        prompts = [rendered(policy.tokenizer, to_messages(q.question, q.system), tokenize=False) for q in self.chats]
        found["prompts_same"] = count_same((engine.tokenize(self._composed(text)) for text in prompts), self.prompts)
        found |= self._answers(policy, file, kind)
        engine.close()
        return found | self._chats(file)

    def _answers(self, policy: Policy, file: Path, kind: str) -> dict[str, Any]:
        evaluated = self._evaluate(self._ask(policy, f"asking {file.name}"))
        return {"budget": evaluated.figures, "falls": verdict.rate_drops(self.unquantised, evaluated, kind)}

    def _composed(self, text: str) -> str:
        return normalize("NFC", text) if self.composes else text

    def _chats(self, file: Path) -> dict[str, Any]:
        """Count the chats that stop by themselves with llama.cpp's own template, tokenizer, sampler and stops, as users have them."""
        from llama_cpp import Llama

        budget = max(1, round(2 * (self.unquantised.figures["mean_budget"] or 50)))  # twice the mean stated one
        with closing(Llama(str(file), n_ctx=CONTEXT, n_threads=llama_cpp.count_threads(), verbose=False)) as model:
            answers = [self._chat(model, q, i) for i, q in enumerate(self.chats)]
            given, _ = self._chat(model, self.chats[0], 0, budget=budget)
        ended = sum(stopped for _, stopped in answers)
        prefilled = render_budget(budget, self.plan.form) + given
        return {"chats": len(answers), "chats_ended": ended, "self_stated": answers[0][0], "prefilled": prefilled}

    def _chat(self, model: "Llama", question: Question, seed: int, **budget: int) -> tuple[str, bool]:
        """One answer, and whether an end token ended it rather than the limit. `budget`: as in chat_template_kwargs."""
        ends = {"bos_token": model.token_bos(), "eos_token": model.token_eos()}
        special = {name: model.detokenize([i], special=True).decode() if i >= 0 else "" for name, i in ends.items()}
        messages, template = to_messages(question.question, question.system), model.metadata["tokenizer.chat_template"]
        prompt = render_chat(template, messages, add_generation_prompt=True, **special, **budget)
        tokens = model.tokenize(prompt.encode(), add_bos=False, special=True)
        how = {"temperature": self.e.temperature, "top_p": self.e.top_p, "seed": seed, **SAMPLERS_OFF}
        done = model.create_completion(tokens, max_tokens=max(1, min(self.e.max_tokens, model.n_ctx() - len(tokens))), **how)
        return done["choices"][0]["text"], done["choices"][0]["finish_reason"] == "stop"

    def _min_chats_ended(self) -> float:
        """Least number of chats that must stop: the trained policy's share, less RATE_SLACK."""
        return len(self.chats) - CHAT_COUNT * (verdict.RATE_SLACK + 1 - self.unquantised.figures["ended"])

    # ---- asking --------------------------------------------------------------------------------------------------------------------

    def _policy(self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> Policy:
        slots, kv_cache_gib = self.e.max_num_seqs, self.plan.settings.kv_cache_gib
        return build_policy(model, tokenizer, slots, kv_cache_gib, form=self.plan.form, prompt=self.plan.prompt)

    def _prompts(self, tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
        return [prompt_ids(tokenizer, q.question, q.system) for q in self.chats]

    def _ask(self, policy: Policy, title: str) -> list[Episode]:
        """Sample answers with the same questions and seeds for every policy."""
        asked = with_seeds(self.questions, self.plan.settings.seed)
        requests = [policy.request(q.question, self.e.max_tokens, own, system=q.system) for q, own in asked]
        return sample_with_progress(policy, requests, Sampling(self.e.temperature, self.e.top_p), title)

    def _evaluate(self, episodes: Sequence[Episode]) -> verdict.ExportEval:
        samples = [score_answer(q, x, self.verify) for q, x in zip(self.questions, episodes, strict=True)]
        return verdict.evaluate_policy(samples, [x.stop_reason == "end" for x in episodes])


def count_same(found: Iterable[list[int]], wanted: Sequence[list[int]]) -> int:
    return sum(ids == others for ids, others in zip(found, wanted, strict=True))
