"""Proxy-tuning as a user meets it: flags, checkpoints, prompts of the expert's own, traces, `jaxllm eval` and lm-eval's adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers

from jaxllm import cli, evaluate, generate, pretrained, tree
from jaxllm.config import ConfigError, ModelConfig
from jaxllm.data.tokenizer import ByteTokenizer, HuggingFace
from jaxllm.evals import harness
from jaxllm.generate import command, proxy
from jaxllm.generate.proxy import Prompt, ProxyFlags, Reader, check_vocabularies, gap_closed, steer_answers
from jaxllm.generate.trace import Trace, Written, boosted, share_changed, trace, write_page
from jaxllm.models.proxy import Trio
from jaxllm.models.transformer import decoder

pytestmark = pytest.mark.whole  # whole commands: `make faults` runs them

LARGE = ModelConfig(num_layers=1, width=16, num_heads=2, num_kv_heads=1, head_size=8, ff_width=24, vocab_size=259, max_length=64)
SMALL = replace(LARGE, width=12, head_size=4, ff_width=16)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
GREEDY = ("--temperature", "0", "--num_tokens", "6")


def weights(config: ModelConfig, seed: int) -> Any:
    """Random params that nothing is compiled for."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(decoder(config).init, jax.random.key(0))
    return tree.map_with_path(lambda path, leaf: rng.normal("norm" in path, 0.3, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three checkpoints of one vocabulary; the expert came with a chat template."""
    root = tmp_path_factory.mktemp("models")
    for seed, (name, config) in enumerate({"base": LARGE, "expert": SMALL, "anti": SMALL}.items()):
        template = TEMPLATE if name == "expert" else None
        stop = (258,) if name == "expert" else (257,)
        pretrained.save(root / name, config, weights(config, seed), ByteTokenizer(), chat_template=template, stop_ids=stop, source={})
    return {name: str(root / name) for name in ("base", "expert", "anti")}


@pytest.fixture(scope="module", autouse=True)
def stacked_layers() -> Iterator[None]:
    """One program for scoring and writing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained.Pretrained, "for_decoding", lambda self, mesh, precision: (self.lm, self.params))
        yield


def steering(folders: dict[str, str]) -> list[str]:
    return ["--expert", folders["expert"], "--anti-expert", folders["anti"]]


@cache
def _whole(config: ModelConfig) -> Any:
    lm = decoder(config)
    return jax.jit(lambda p, tokens: lm.unembed(p).logits(lm.apply(p, tokens).hidden))


def pair(prompt: list[int], expert: list[int], ids: list[int], alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """(base, proxy) probabilities after these, by whole rows in float64."""
    rows = []
    for seed, (config, row) in enumerate(((LARGE, prompt), (SMALL, expert), (SMALL, prompt))):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(row) + len(ids)] = [*row, *ids]
        rows.append(np.asarray(_whole(config)(weights(config, seed), padded))[0, len(row) + len(ids) - 1].astype(np.float64))
    both = np.stack([rows[0], rows[0] + alpha * (rows[1] - rows[2])])
    both = np.exp(both - both.max(-1, keepdims=True))
    return tuple(both / both.sum(-1, keepdims=True))  # type: ignore[return-value]


def greedy(prompt: list[int], expert: list[int], num: int, alpha: float = 1.0) -> list[int]:
    ids: list[int] = []
    for _ in range(num):
        ids.append(int(pair(prompt, expert, ids, alpha)[1].argmax()))
    return ids


def text_of(ids: list[int]) -> str:
    """Up to a stop token of base or expert."""
    ends = [ids.index(stop) for stop in (257, 258) if stop in ids]
    return bytes(token for token in ids[: min(ends, default=len(ids))] if token < 256).decode(errors="replace")


# ---------------------------------------------------------------------------------------------------- generating


def test_generate_writes_what_the_formula_says(folders: dict[str, str], capsys: pytest.CaptureFixture[str]):
    ids = [256, *b"ab"]
    want = "ab" + text_of(greedy(ids, ids, 6)) + "\n"
    assert cli.main(["generate", folders["base"], *steering(folders), "--prompt", "ab", *GREEDY]) == 0
    assert capsys.readouterr().out == want
    assert text_of(greedy(ids, ids, 6)) != text_of(greedy(ids, ids, 6, alpha=0.0)), "no steering is seen: the test is too easy"


def test_the_base_may_come_first_or_by_name():
    for words in (["B", "--prompt", "x"], ["--base", "B", "--prompt", "x"], ["--prompt", "x", "--base=B"]):
        assert command._checkpoint(words) == ("B", ["--prompt", "x"])
    for words in (["--prompt", "x"], ["--base"], ["--base", "--prompt", "x"], ["--base="]):
        with pytest.raises(ConfigError, match="needs a checkpoint first"):
            command._checkpoint(words)


def test_a_file_with_the_expert_s_chat_tells_the_proxy_s_log_probabilities_and_draws_a_page(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts = ["a", "Say b"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    words = ["--file", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "o.jsonl"), "--logprobs", "--batch_size", "2"]
    words += ["--expert_chat", "True", "--trace", str(tmp_path / "page.html"), *GREEDY]
    assert cli.main(["generate", folders["base"], *steering(folders), *words]) == 0
    found = [json.loads(line)["samples"][0] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    changed, total = 0, 0
    for prompt, sample in zip(prompts, found, strict=True):
        base, expert = [256, *prompt.encode()], [256, *f"<user>{prompt}\n<assistant>".encode()]
        assert sample["ids"] == greedy(base, expert, 6)[: len(sample["ids"])] and sample["text"] == text_of(sample["ids"])
        for t, logp in enumerate(sample["logprobs"]):
            plain, steered = pair(base, expert, sample["ids"][:t], 1.0)
            assert logp == pytest.approx(np.log(steered[sample["ids"][t]]), abs=1e-4)
            changed, total = changed + (plain.argmax() != steered.argmax()), total + 1
    page = (tmp_path / "page.html").read_text()
    assert f"{changed / total:.1%}</span> <span" in page and f"{total:,} tokens in 2 texts" in page
    assert f"{changed / total:.1%} of greedy predictions changed" in capsys.readouterr().err
    assert "http" not in page and "<script" not in page, "it fetches nothing"


def test_a_response_prefix_and_a_system_message_stay_where_they_belong():
    reader = Reader(ByteTokenizer(), TEMPLATE, "Be brief.", "Answer:")
    assert bytes(reader.ids("2+2? Answer:")[1:]).decode() == "<system>Be brief.\n<user>2+2? \n<assistant>Answer:"
    assert bytes(reader.ids("Answer: 4?")[1:]).decode() == "<system>Be brief.\n<user>Answer: 4?\n<assistant>"
    own = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    assert bytes(reader.chat_ids(own)[1:]).decode() == "<system>x\n<user>y\n<assistant>", "a chat's own system message counts"


def test_the_template_may_be_given_as_text_or_file(folders: dict[str, str], tmp_path: Path):
    (tmp_path / "t.jinja").write_text("[{{ messages[0].content }}]")
    base = pretrained.load(folders["base"])
    flags = ProxyFlags(expert=folders["expert"], anti_expert=folders["anti"])
    for given in ("[{{ messages[0].content }}]", str(tmp_path / "t.jinja")):
        model = proxy.steered(base, replace(flags, expert_chat=given))
        assert model.reader is not None and bytes(model.reader.ids("x")[1:]) == b"[x]"
    assert proxy.steered(base, flags).reader is None and proxy.steered(base, flags).stop_ids == (257, 258), "the expert ends its turns"
    with pytest.raises(ConfigError, match=r"neither True .* nor a Jinja template .* nor a file that can be read"):
        proxy.steered(base, replace(flags, expert_chat="chat"))


def test_a_prompt_of_the_expert_that_fills_the_context_is_refused(folders: dict[str, str]):
    words = [folders["base"], *steering(folders), "--prompt", "x" * 50, "--expert_chat", "True"]
    with pytest.raises(ConfigError, match="as the expert reads it, prompt 0 has 69 tokens, and a context of 64"):
        generate.main(words)


def test_an_expert_s_chat_needs_no_memory_and_beams_go_through(folders: dict[str, str], capsys: pytest.CaptureFixture[str]):
    words = ["generate", folders["base"], *steering(folders), "--expert_chat", "True", "--num_tokens", "3"]
    assert cli.main([*words, "--chat", "--prompt", "hi"]) == 0
    assert cli.main([*words, "--prompt", "hi", "--num_beams", "2"]) == 0
    assert "hi" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, says",
    [
        ("--expert E", "--expert needs --anti_expert"),
        ("--anti_expert A", "--anti_expert needs --expert"),
        ("--alpha 0.5", "--alpha is of proxy-tuning; give --expert and --anti_expert with it"),
        ("--plausible 0.1", "--plausible is of proxy-tuning"),
        ("--trace p.html", "--trace shows what proxy-tuning changes"),
        ("--expert E --anti_expert A --alpha nan", "alpha is nan; it must be finite"),
        ("--expert E --anti_expert A --alpha inf", "alpha is inf; it must be finite"),
        ("--expert E --anti_expert A --plausible 2", "plausible is 2.0; it is a share"),
        ("--expert E --anti_expert A --expert_system s", "--expert_system is of the expert's chat"),
        ("--expert E --anti_expert A --vocab_tail cut", "--vocab_tail"),
        ("--expert nowhere --anti_expert A", "nowhere does not exist"),
        ("--expert E --anti_expert A --trace page", "--trace is page; give a page"),
        ("--expert E --anti_expert A --base B", "--base names the checkpoint that comes first otherwise"),
    ],
)
def test_mistakes_end_with_status_2_and_say_what_is_wrong(
    folders: dict[str, str], words: str, says: str, capsys: pytest.CaptureFixture[str]
):
    given = [{"E": folders["expert"], "A": folders["anti"], "B": folders["base"]}.get(word, word) for word in words.split()]
    assert cli.main(["generate", folders["base"], "--prompt", "x", *given]) == 2
    assert says in capsys.readouterr().err


def test_a_shorter_context_is_refused_with_the_flag_that_helps(folders: dict[str, str], tmp_path: Path):
    short = replace(SMALL, max_length=32)
    pretrained.save(tmp_path / "short", short, weights(short, 1), ByteTokenizer(), source={})
    flags = ProxyFlags(expert=str(tmp_path / "short"), anti_expert=folders["anti"])
    base = pretrained.load(folders["base"])
    with pytest.raises(ConfigError, match=r"has a context of 32 tokens, and 64 are asked for.*give --max_length 32"):
        proxy.steered(base, flags)
    assert proxy.steered(base, flags, max_length=32).config.max_length == 32
    assert cli.main(["generate", folders["base"], "--expert", flags.expert, "--anti_expert", flags.anti_expert, "--prompt", "x"]) == 2


# --------------------------------------------------------------------------------------------------- vocabularies


def words_of(*words: str, special: tuple[str, ...] = ()) -> HuggingFace:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: id for id, word in enumerate(words)}, unk_token=words[0]))
    made.add_special_tokens(list(special))
    return HuggingFace(made.to_str(), {})


def test_oracle_4_vocabularies_are_compared_token_by_token_and_by_the_names_of_special_ones():
    ours = words_of("a", "b", "c", special=("<s>",))
    check_vocabularies(ours, words_of("a", "b", "c", special=("<s>",)), "E")
    with pytest.raises(ConfigError, match="token 1 is b'b' to the base and b'c' to E"):
        check_vocabularies(ours, words_of("a", "c", "b", special=("<s>",)), "E", "ignore")
    with pytest.raises(ConfigError, match="token 3 is '<s>' to the base and '<t>' to E"):
        check_vocabularies(ours, words_of("a", "b", "c", special=("<t>",)), "E", "ignore")
    longer = words_of("a", "b", "c", special=("<s>", "<pad>"))
    with pytest.raises(ConfigError, match=r"has 4 tokens and that of E 5.*--vocab_tail ignore"):
        check_vocabularies(ours, longer, "E")
    check_vocabularies(ours, longer, "E", "ignore")
    with pytest.raises(ConfigError, match="token 0 is"):
        check_vocabularies(ByteTokenizer(), words_of(*(f"w{n}" for n in range(259))), "an expert of as many tokens")


def test_oracle_4_a_model_with_a_longer_table_is_refused_before_its_weights_are_read(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    padded = replace(SMALL, vocab_size=264)
    pretrained.save(tmp_path / "padded", padded, weights(padded, 1), ByteTokenizer(), source={})
    base = pretrained.load(folders["base"])
    flags = ProxyFlags(expert=str(tmp_path / "padded"), anti_expert=folders["anti"])
    assert proxy.steered(base, replace(flags, vocab_tail="ignore")).lm.config.vocab_size == 259
    monkeypatch.setattr(pretrained, "load", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(ConfigError, match="the model of --expert has 264 vocabulary entries and the base 259"):
        proxy.steered(base, flags)


# ------------------------------------------------------------------------------------------- evaluation, lm-eval


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("tasks")
    questions = [{"question": f"{a}+1=", "choices": [str(a + 1), "many"], "answer": 0} for a in range(2)]
    (root / "c.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    (root / "g.jsonl").write_text("".join(json.dumps({"question": f"{i}?", "answer": f"#### {i}"}) + "\n" for i in range(2)))
    return {"choice": f"choice:{root / 'c.jsonl'}", "gsm8k": f"gsm8k:{root / 'g.jsonl'}"}


def evaluated(folders: dict[str, str], tmp_path: Path, task: str, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    given = {"expert": folders["expert"], "anti_expert": folders["anti"], **options} if options.pop("steer", True) else options
    given.pop("steer", None)
    config = evaluate.EvalConfig(tasks=(task,), out=str(tmp_path / "out.json"), batch_tokens=64, max_new_tokens=4, **given)
    results = evaluate.evaluate(folders["base"], config)
    return results["tasks"], [json.loads(line) for line in (tmp_path / "out.answers.jsonl").read_text().splitlines()]


def test_eval_scores_by_the_proxy_and_takes_no_answer_of_other_settings(folders: dict[str, str], tasks: dict[str, str], tmp_path: Path):
    found, answers = evaluated(folders, tmp_path, tasks["choice"], alpha=0.5)
    prompt, choices = [256, *b"0+1="], [b" 1", b" many"]
    for answer, choice in zip(answers[:2], choices, strict=True):
        want = sum(np.log(pair(prompt, prompt, list(choice[:t]), 0.5)[1][token]) for t, token in enumerate(choice))
        mine = next(a for a in answers if a["document"] == 0 and a["choice"] == answer["choice"])
        assert mine["score"][0] == pytest.approx(want, abs=1e-3)
    (name,) = found
    how = found[name]["settings"]
    assert (
        "--alpha 0.5" in name and how["alpha"] == 0.5 and re.fullmatch("[0-9a-f]{8}", how["expert"]) and how["expert"] != how["anti_expert"]
    )
    _, both = evaluated(folders, tmp_path, tasks["choice"], steer=False)
    assert len({one["key"] for one in both}) == 2, "the base's answers are its own"


def test_small_models_may_lie_in_the_cache(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXLLM_CACHE", str(Path(folders["base"]).parent))
    flags = ProxyFlags(expert="cache://expert", anti_expert="cache://anti", expert_chat="True")
    there = replace(flags, expert=folders["expert"], anti_expert=folders["anti"])
    assert proxy.describe(flags) == proxy.describe(there)
    made = proxy.steered(pretrained.load("cache://base"), flags, checkpoint="cache://base")
    assert made.reader is not None and made.reader.template == TEMPLATE and made.reader.tokenizer.num_vocab == 259


def test_what_decides_an_answer_is_told_by_content(folders: dict[str, str], tmp_path: Path):
    flags = ProxyFlags(expert=folders["expert"], anti_expert=folders["anti"])
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    swapped = replace(flags, expert=flags.anti_expert, anti_expert=flags.expert)
    own, file = (proxy.describe(replace(flags, expert_chat=given)) for given in ("True", str(tmp_path / "t.jinja")))
    told = [proxy.describe(flags), proxy.describe(replace(flags, alpha=0.5)), proxy.describe(swapped), own]
    assert len({json.dumps(one) for one in told}) == 4 and own == file, "one template, from wherever"
    assert proxy.describe(ProxyFlags()) == {}


def test_eval_writes_with_the_expert_s_own_prompt(folders: dict[str, str], tasks: dict[str, str], tmp_path: Path):
    _, answers = evaluated(folders, tmp_path, tasks["gsm8k"], expert_chat="True")
    for n, answer in enumerate(sorted(answers, key=lambda one: one["item"])):
        text = f"Question: {n}?\nAnswer:"
        expert = [256, *f"<user>{text}\n<assistant>".encode()]
        assert answer["texts"] == [text_of(greedy([256, *text.encode()], expert, 4))]
    with pytest.raises(ConfigError, match="--num_beams gives all three models one prompt"):
        evaluated(folders, tmp_path, tasks["gsm8k"], expert_chat="True", num_beams=2)


def test_eval_refuses_a_chat_where_texts_are_scored(folders: dict[str, str], tasks: dict[str, str]):
    with pytest.raises(ConfigError, match=r"no task here reads --expert_chat \(choice\)"):
        evaluate.main([folders["base"], *steering(folders), "--tasks", tasks["choice"], "--expert_chat", "True"])


def test_lm_eval_s_adapter_takes_the_same_arguments(folders: dict[str, str]):
    class Adapter(harness.Answers):
        load = staticmethod(evaluate._load)
        cache_hook = SimpleNamespace(add_partial=lambda *_: None)

    given = {"expert": folders["expert"], "anti_expert": folders["anti"], "alpha": "0.5"}  # words, as --model_args gives them
    pytest.importorskip("tqdm")
    (found,) = Adapter(folders["base"], **given).loglikelihood([SimpleNamespace(args=("ab", "c"))], disable_tqdm=True)
    assert found[0] == pytest.approx(np.log(pair([256, *b"ab"], [256, *b"ab"], [], 0.5)[1][ord("c")]), abs=1e-4)
    talking = Adapter(folders["base"], **given, expert_chat=True)
    with pytest.raises(ConfigError, match="likelihoods have one prompt for all three models"):
        talking.loglikelihood([SimpleNamespace(args=("ab", "c"))], disable_tqdm=True)
    asked = [SimpleNamespace(args=("ab", {"until": ["\n\n"], "max_gen_toks": 4}))]
    want = greedy([256, *b"ab"], [256, *b"<user>ab\n<assistant>"], 4, alpha=0.5)
    assert talking.generate_until(asked, disable_tqdm=True) == [text_of(want)]
    with pytest.raises(ConfigError, match="--model_args has no 'exprt'; did you mean 'expert'"):
        Adapter(folders["base"], exprt="x")


# ------------------------------------------------------------------------------------------------------- tracing


def test_a_trace_is_the_two_probabilities_of_every_token(tmp_path: Path):
    trio = Trio(decoder(LARGE), decoder(SMALL), decoder(SMALL), 0.7)
    params = {"base": weights(LARGE, 0), "expert": weights(SMALL, 1), "anti": weights(SMALL, 2)}
    texts = [Written([256, 97], [256, 60, 97, 62], [5, 9, 5]), Written([256, 98, 99], [256, 98, 99], [7]), Written([256], [256], [])]
    found = trace(trio, params, texts, batch_rows=2)
    for text, one in zip(texts, found, strict=True):
        assert one.ids == list(text.ids)
        for t, token in enumerate(text.ids):
            base, steered = pair(list(text.prompt), list(text.expert_prompt), list(text.ids[:t]), 0.7)
            assert one.base[t] == pytest.approx(base[token], abs=1e-5) and one.proxy[t] == pytest.approx(steered[token], abs=1e-5)
            assert one.changed[t] == (base.argmax() != steered.argmax())
    write_page(tmp_path / "p.html", found, texts, ByteTokenizer(), "<Title>", "note")
    page = (tmp_path / "p.html").read_text()
    assert "&lt;Title&gt;" in page and f'title="{found[1].base[0]:.3f} → {found[1].proxy[0]:.3f}"' in page


def test_what_is_boosted_and_how_much_changed():
    first = Trace([1, 2, 1], np.array([0.1, 0.5, 0.2]), np.array([0.5, 0.4, 0.2]), np.array([True, False, False]))
    second = Trace([2, 3], np.array([0.2, 0.0]), np.array([0.3, 1.0]), np.array([True, True]))
    rows = boosted([first, second])
    assert [row.id for row in rows] == [3, 1, 2] and [row.times for row in rows] == [1, 2, 2]
    np.testing.assert_allclose([row.delta for row in rows], [1.0, 0.2, 0.0], atol=1e-12)
    assert [row.id for row in boosted([first, second], min_count=2)] == [1, 2]
    assert share_changed([first, second]) == pytest.approx(3 / 5) and share_changed([]) == 0 and boosted([]) == []


# ---------------------------------------------------------------------------------------------------- experiments


def test_oracle_9_the_gap_that_is_closed_is_not_clipped():
    assert gap_closed(6.6, 26.4, 32.4) == pytest.approx(0.767442, abs=1e-6)
    assert gap_closed(49.1, 82.0, 80.4) > 1 and gap_closed(5.0, 4.0, 6.0) == -1
    with pytest.raises(ConfigError, match="no gap to close"):
        gap_closed(1.0, 2.0, 1.0)


def test_the_published_average_gap_of_the_chat_models_comes_out():
    """arXiv:2401.08565, table 1; Toxigen's fall counts as a gain. The printed entries give 91.8 and 87.3 %, the claim is 91.1 and 88.1."""
    large = {
        13: [(2.1, 83.4, 87.3), (6.6, 26.4, 32.4), (70.4, 0.1, 0.0), (38.6, 57.4, 61.6), (49.1, 82.0, 80.4)],
        70: [(3.7, 88.0, 90.4), (9.6, 32.0, 51.8), (67.4, 0.0, 0.0), (42.3, 59.2, 68.3), (53.9, 85.1, 79.6)],
    }
    closed = {size: np.mean([gap_closed(*row) for row in rows]) for size, rows in large.items()}
    assert closed[13] > 0.9 and closed[70] > 0.85


def test_answers_of_one_token_from_an_interface():
    top = {"A": -0.5, "B": -1.5, "the": -2.5}
    expert, anti = {"A": 1.0, "B": 3.0, "C": 2.0, "D": 0.0}, {"A": 1.0, "B": 0.5, "C": 0.0, "D": 0.0}
    scores = {"A": -0.5, "B": 1.0, "C": -0.5, "D": -2.5}  # C and D floored at -2.5
    for missing, left in (("drop", ["B", "A"]), ("floor", ["B", "A", "C", "D"])):
        found = steer_answers(top, expert, anti, missing=missing)  # type: ignore[arg-type]
        total = np.log(sum(np.exp(scores[answer]) for answer in left))
        assert set(found) == set(left) and next(iter(found)) == "B"
        np.testing.assert_allclose([found[a] for a in left], [scores[a] - total for a in left], atol=1e-12)
    assert steer_answers({"the": -0.1}, expert, anti) == {}, "the paper leaves such questions out"
    assert next(iter(steer_answers(top, expert, anti, alpha=0.0))) == "A"
    for given, says in (
        (({}, expert, anti, 1.0, "floor"), "top is empty"),
        ((top, expert, {"A": 0.0}), "differ in their answers: B, C, D"),
    ):
        with pytest.raises(ConfigError, match=says):
            steer_answers(*given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="top has 'A': nan"):
        steer_answers({"A": float("nan")}, expert, anti)


def test_a_prompt_with_two_readings_is_a_list_like_any_other():
    both = Prompt([1, 2], [1, 7, 2])
    assert json.dumps(both) == "[1, 2]" and both.expert == [1, 7, 2] and command.proxy.expert_prompt([4]) == [4]
