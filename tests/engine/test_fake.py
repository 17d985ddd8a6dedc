"""The scripted engine behaves as an engine does."""

import math
import time

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langgraph.graph import START, MessagesState, StateGraph

from marft_graph.engine.base import GenerationRequest, SamplingSettings, SupportsGate
from marft_graph.engine.fake import END_OF_SEQUENCE, ByteCodec, FakeEngine
from marft_graph.errors import EngineError
from marft_graph.rollout.runner import run_episodes


def ask(engine, agent="actor", **sampling):
    messages = (HumanMessage("hi"),)
    prompt = engine.codec(agent).render(messages)
    request = GenerationRequest(agent, prompt, SamplingSettings(**sampling), messages=messages)
    return engine.submit(request)


def text(completion):
    return ByteCodec().parse(completion.ids).text


@pytest.fixture
def make():
    made = []
    yield lambda *args, **settings: made.append(FakeEngine(*args, **settings)) or made[-1]
    for engine in made:
        engine.close()


def test_one_answer_serves_every_agent(make):
    engine = make("yes")
    assert [text(ask(engine, agent).result(5)) for agent in ("a", "b", None)] == ["yes"] * 3


def test_a_list_is_used_in_turn_for_each_agent(make):
    engine = make({"a": ["1", "2"], "b": "3"})
    answers = [text(ask(engine, agent).result(5)) for agent in "aabaa"]
    assert answers == ["1", "2", "3", "1", "2"]


def test_agents_may_be_named_by_their_path(make):
    engine = make({"team/writer": "yes"})
    assert text(ask(engine, "team-2Fwriter").result(5)) == "yes"


def test_a_function_sees_agent_messages_and_tools(make):
    engine = make(lambda agent, messages, tools: f"{agent} {messages[0].text} {len(tools)}")
    assert text(ask(engine).result(5)) == "actor hi 0"


@pytest.mark.parametrize("script", [lambda a, m: ValueError("no"), lambda a, m: [][1]])
def test_an_exception_is_raised_by_the_call(script, make):
    with pytest.raises((ValueError, IndexError)):
        ask(make(script)).result(5)


def test_an_agent_without_an_answer_is_an_error_that_names_the_script(make):
    with pytest.raises(EngineError, match="'actor'; it has 'reasoner'"):
        ask(make({"reasoner": "x"})).result(5)


def test_an_answer_of_another_type_is_refused(make):
    with pytest.raises(EngineError, match="an answer is a text"):
        ask(make(lambda agent, messages: 7)).result(5)


def test_tokens_are_bytes_with_an_end_and_one_log_prob_each(make):
    completion = ask(make("añ")).result(5)
    assert completion.ids == (97, 195, 177, END_OF_SEQUENCE)
    assert completion.logprobs == pytest.approx([-math.log(257)] * 4)
    assert completion.finish_reason == "stop"


def test_the_token_limit_cuts_an_answer(make):
    completion = ask(make("abcdef"), max_tokens=3).result(5)
    assert completion.ids == tuple(b"abc")
    assert completion.finish_reason == "length"


def test_a_stop_text_ends_an_answer_and_the_codec_drops_it(make):
    completion = ask(make("one. two."), stop=(".",)).result(5)
    assert bytes(completion.ids) == b"one."
    assert completion.finish_reason == "stop"
    assert ByteCodec().parse(completion.ids, stop=["."]).text == "one"


def test_tool_calls_survive_the_round_trip(make):
    call = {"name": "add", "args": {"a": 1}, "id": "x"}
    message = ByteCodec().parse(ask(make(AIMessage("sum", tool_calls=[call]))).result(5).ids)
    assert message.content == "sum"
    assert [(made["name"], made["args"]) for made in message.tool_calls] == [("add", {"a": 1})]


def test_a_malformed_tool_call_is_an_invalid_one():
    message = ByteCodec().parse([*b"<tool_call>{oops</tool_call>"])
    assert message.tool_calls == []
    assert message.invalid_tool_calls[0]["args"] == "{oops"


def test_prompts_differ_by_role_text_and_tools():
    codec = ByteCodec()
    prompts = {
        codec.render([HumanMessage("a")]),
        codec.render([SystemMessage("a")]),
        codec.render([HumanMessage("b")]),
        codec.render([HumanMessage("a")], [{"type": "function"}]),
    }
    assert len(prompts) == 4


def test_a_delay_is_kept(make):
    started = time.monotonic()
    ask(make("x", delay=0.05)).result(5)
    assert time.monotonic() - started >= 0.05


def test_a_cancelled_request_is_not_answered(make):
    engine = make("x", delay=0.05)
    future = ask(engine)
    assert future.cancel()
    ask(engine).result(5)
    assert len(engine.requests) == 1


def test_closing_fails_what_waits_and_refuses_more(make):
    engine = make("x", delay=60)
    future = ask(engine)
    engine.close()
    with pytest.raises(EngineError, match="closed before"):
        future.result(5)
    with pytest.raises(EngineError, match="closed"):
        ask(engine)


def test_it_asks_its_gate_before_it_answers(make):
    class CountingGate:
        waits = 0

        def wait(self):
            self.waits += 1

    engine, gate = make("x"), CountingGate()
    assert isinstance(engine, SupportsGate)
    engine.use_gate(gate)
    ask(engine).result(5)
    assert gate.waits >= 1


def test_a_script_that_is_used_up_says_so_to_calls_that_are_awaited(make):
    async def solver(state):
        return {"messages": [await FakeListChatModel(responses=["own"]).ainvoke("q")]}

    app = StateGraph(MessagesState).add_node("solver", solver).add_edge(START, "solver").compile()
    answers = iter(["one"])
    engine = make(lambda request: next(answers))
    examples = [{"messages": "1"}, {"messages": "2"}]
    episodes = run_episodes(app, examples, engine=engine, episode_timeout=20)
    (failed,) = (episode for episode in episodes if not episode.ok)
    assert "the script has no more answers, for 'solver'" in failed.error
