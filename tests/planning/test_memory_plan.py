"""The plan: what its parts are, that they are those of the real objects, and which way they move."""

from dataclasses import replace

import pytest
import torch

from sbtiny.config import Settings
from sbtiny.load_settings import PRESETS, load_settings
from sbtiny.models.aliases import ALIASES
from sbtiny.models.device import CARDS, DeviceInfo, parse_nvidia_smi, pick_preset
from sbtiny.models.shapes import SHAPES, shape_of
from sbtiny.planning.memory_plan import ADAPTER, GB, SAVED_16, MemoryPlan, cap_micro_batch, plan_memory
from sbtiny.planning.workload import STAGES

CPU = DeviceInfo("cpu", "a processor", 24.0, 20.0, cpu_bf16=True)
SMALL_CARD = DeviceInfo("cuda", "RTX 3060", 11.7, 11.0, (8, 6))


def planned(stage: str = "grpo", preset: str = "rtx4090", seen: DeviceInfo = CPU, model: str = "qwen-1.5b", **grpo: int) -> MemoryPlan:
    settings = load_settings(preset=preset, overrides=[(f"grpo.{key}", value) for key, value in grpo.items()])
    return plan_memory(stage, settings, shape_of(model), seen, preset)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("alias", [alias.name for alias in ALIASES])
def test_every_alias_has_a_plan_with_every_preset(alias: str, preset: str, stage: str) -> None:
    found = planned(stage, preset, model=alias)
    assert found.peak_gb > found.parts["weights"] > 0
    assert found.here == (preset == "cpu")
    assert max(found.parts.values()) <= found.peak_gb <= sum(found.parts.values()) + 0.01


@pytest.mark.parametrize("preset", ["t4", "rtx4090"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_presets_fit_their_cards_with_the_model_they_name(preset: str, stage: str) -> None:
    found = planned(stage, preset)
    assert found.fits
    assert found.target.name == CARDS[preset].name
    assert found.dtype == {"t4": "float16", "rtx4090": "bfloat16"}[preset]


def test_a_gpu_that_is_here_counts_more_than_the_card_of_the_preset() -> None:
    found = planned(seen=SMALL_CARD)
    assert (found.target.name, found.here, found.free_gb) == ("RTX 3060", True, 11.0)


def test_the_parts_are_the_sizes_of_the_real_objects() -> None:
    parts = planned(prompts_per_step=4, num_generations=5, micro_batch=2, max_num_seqs=40, max_tokens=2048).parts
    cache = torch.empty((28, 2, 40, 2, 2304, 128), dtype=torch.bfloat16, device="meta")  # Engine._reserve
    assert parts["kv_slots"] == pytest.approx(cache.nbytes / GB, abs=1e-3)
    assert parts["lora_and_adam"] == pytest.approx(SHAPES["qwen-1.5b"].lora(32) * ADAPTER / GB, abs=1e-3)
    assert parts["decode_copy"] == pytest.approx(28 * 46_792_704 * 2 / GB, abs=1e-3)
    assert parts["weights"] == pytest.approx(1.50, abs=0.01)  # 0.63 in four bits, 0.87 of embedding and head


def test_a_micro_batch_weighs_what_its_tokens_save() -> None:
    one, two = (planned(micro_batch=n).parts["activations"] for n in (1, 2))
    assert two == pytest.approx(2 * one, rel=1e-3)


def test_the_passes_of_an_update_follow_from_its_rows() -> None:
    assert [planned(stage).gradient_accumulation for stage in STAGES] == [0, 8, 20, 0]
    assert planned(prompts_per_step=4, num_generations=5, micro_batch=64).gradient_accumulation == 1


def test_the_largest_micro_batch_divides_and_fits_and_the_next_one_does_not() -> None:
    found = planned(micro_batch=1)
    larger = [n for n in range(found.largest_micro_batch + 1, 41) if 40 % n == 0]
    assert 40 % found.largest_micro_batch == 0
    assert planned(micro_batch=found.largest_micro_batch).fits
    assert not planned(micro_batch=larger[0]).fits


def test_what_does_not_fit_says_so() -> None:
    found = planned(preset="t4", model="qwen-7b")
    assert not found.fits
    assert found.largest_micro_batch == 0


def test_auto_takes_the_preset_of_the_memory_and_a_micro_batch_that_fits() -> None:
    assert [pick_preset(seen) for seen in (CPU, *CARDS.values(), SMALL_CARD)] == ["cpu", "t4", "rtx4090", "t4"]
    wide = load_settings(preset="rtx4090", overrides=[("grpo.micro_batch", 40)])
    tight = cap_micro_batch(wide, "grpo", SHAPES["qwen-1.5b"], CARDS["rtx4090"])
    assert tight.grpo.micro_batch == planned(micro_batch=40).largest_micro_batch
    assert replace(tight, grpo=wide.grpo) == wide
    few = load_settings(preset="rtx4090")
    assert cap_micro_batch(few, "grpo", SHAPES["qwen-1.5b"], CARDS["rtx4090"]) == few  # what is small enough is the user's
    assert cap_micro_batch(wide, "grpo", SHAPES["qwen-7b"], CARDS["t4"]) == wide  # nothing fits: the plan says it


def test_tokens_are_the_most_that_the_settings_allow() -> None:
    short = {"steps": 10, "prompts_per_step": 4, "num_generations": 5, "micro_batch": 1, "max_tokens": 1000}
    b_max, groups = 40 * 1000, 10 * 20 * 1000
    assert planned(**short).tokens_at_most == {"sampled": b_max + groups, "trained": 10 * 20 * 1256}
    assert planned(**short, limit=30).tokens_at_most["sampled"] == 30 * 1000 + groups  # questions drawn again
    assert planned(**short, resample_zero_std=True).tokens_at_most["sampled"] == b_max + 2 * groups
    two_of_four = load_settings(
        overrides=[("data.limit", 10), ("data.samples_per_question", 4), ("data.rows_per_question", 2), ("sft.epochs", 3)]
    )
    assert plan_memory("sft", two_of_four, shape_of("tiny"), CPU).tokens_at_most == {"sampled": 40 * 900, "trained": 20 * 3 * 1024}
    given = load_settings(overrides=[("sft.rows", "rows.jsonl"), ("sft.steps", 7)])
    for share, passes in ((0.0, 1), (0.5, 2), (1.0, 3)):  # of a row, the mean
        contrast = load_settings(
            overrides=[("sft.rows", "r.jsonl"), ("sft.steps", 7), ("sft.contrast", 0.1), ("sft.contrast_share", share)]
        )
        assert plan_memory("sft", contrast, shape_of("tiny"), CPU).tokens_at_most["trained"] == passes * 7 * given.sft.batch * 1024
    assert plan_memory("sft", given, shape_of("tiny"), CPU).tokens_at_most == {"sampled": 0, "trained": 7 * given.sft.batch * 1024}


def test_saved_bytes_are_those_that_autograd_holds() -> None:
    """The counts of the module, against a Llama with LoRA under autocast: two lengths, so that what is no token's cancels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sbtiny.models.load import add_lora

    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = add_lora(LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, head_dim=16, **sizes)), rank=8).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def held(tokens: int) -> int:
        found: dict[int, torch.UntypedStorage] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage
            return tensor

        ids = torch.ones(1, tokens, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            state = model.model.model(input_ids=ids).last_hidden_state  # noqa: F841  (keeps the graph alive)
        return sum(storage.nbytes() for storage in found.values())

    values = {"width": 64, "feed_forward": 160, "q": 64, "kv": 32, "rank": 8, "heads": 4}
    expected = 2 * sum(SAVED_16[name] * value for name, value in values.items())
    assert (held(512) - held(256)) / 256 == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("RTX 4090, 24564, 23028, 8.9, 560.35\n", DeviceInfo("cuda", "RTX 4090", 24.0, 22.5, (8, 9), driver="560.35")),
        ("T4, 15360, 14913, 7.5, 535.1\nT4, 15360, 1, 7.5, 535.1\n", DeviceInfo("cuda", "T4", 15.0, 14.6, (7, 5), driver="535.1")),
        ("No devices were found\n", None),
        ("", None),
    ],
)
def test_what_nvidia_smi_says_is_read(line: str, found: DeviceInfo | None) -> None:
    assert parse_nvidia_smi(line) == found


def test_the_defaults_plan_on_a_processor_without_bfloat16() -> None:
    old = replace(CPU, cpu_bf16=False)
    new, found = (plan_memory("sft", Settings(), SHAPES["smollm2-135m"], seen) for seen in (CPU, old))
    assert (new.dtype, found.dtype) == ("bfloat16", "float32")
    assert found.parts["kv_slots"] == pytest.approx(2 * new.parts["kv_slots"], abs=0.002)


def test_the_memory_of_answers_under_way_limits_their_slots() -> None:
    def grpo(room: float | None) -> MemoryPlan:
        settings = load_settings(preset="rtx4090", overrides=[("kv_cache_gib", room)])
        return plan_memory("grpo", settings, shape_of("qwen-1.5b"), CPU, "rtx4090")

    free, half = grpo(None), grpo(2.0)
    assert (free.slots, half.slots) == (40, 17)
    assert half.parts["kv_slots"] == pytest.approx(free.parts["kv_slots"] * 17 / 40, abs=1e-3)
    assert half.parts["kv_slots"] <= 2.0
    assert grpo(1e-3).slots == 1
    assert grpo(100.0).record() == free.record()


def test_only_our_own_engine_and_vllm_hold_the_weights_twice() -> None:
    settings = load_settings(preset="rtx4090", overrides=[("engine", "generate")])
    parts = plan_memory("eval", settings, shape_of("qwen-1.5b"), CPU, "rtx4090").parts
    assert parts["decode_copy"] == 0 < planned("eval").parts["decode_copy"]
