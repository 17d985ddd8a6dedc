"""Nodes that reach their model in the many ways in which apps do; each is one function.

Every name of `AGENTS` asks a chat model, every one of `UNCERTAIN` might, of `NONE` none does.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from langchain.agents import create_agent
from langchain.chat_models import init_chat_model
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig, RunnableLambda, RunnableParallel, chain
from langchain_core.tools import tool

from tests.apps import model
from tests.graph.own_models import ToolModel

toolbox = types.ModuleType("toolbox")
toolbox.model = model  # type: ignore[attr-defined]
toolbox.make_model = lambda: ToolModel()  # type: ignore[attr-defined]
toolbox.inner = types.ModuleType("toolbox.inner")  # type: ignore[attr-defined]
toolbox.inner.MODELS = {"fast": model}  # type: ignore[attr-defined]
configurable = init_chat_model(configurable_fields=("model",))
current: contextvars.ContextVar[Any] = contextvars.ContextVar("current", default=model)
_late: Any = None


class Desk:
    """An object with its model in every place."""

    shared = model

    def __init__(self, own: Any = None) -> None:
        self.own = own
        self._lazy: Any = None

    @property
    def by_property(self) -> Any:
        return ToolModel()

    @functools.cached_property
    def by_cached_property(self) -> Any:
        return ToolModel()

    @staticmethod
    def ask_statically(messages: Any) -> Any:
        return model.invoke(messages)

    @classmethod
    def ask_as_class(cls, messages: Any) -> Any:
        return cls.shared.invoke(messages)

    @property
    def lazy(self) -> Any:
        if self._lazy is None:
            self._lazy = ToolModel()
        return self._lazy

    def ask(self, messages: Any) -> Any:
        return self.shared.invoke(messages)

    def look_up(self, state: Any) -> Any:
        return {"messages": [("ai", str(len(state["messages"])))]}

    def work(self, state: Any) -> Any:
        return {"messages": [self.own.invoke(state["messages"])]}


class Base:
    def answer(self, state: Any) -> Any:
        return {"messages": [model.invoke(state["messages"])]}


class Derived(Base):
    def run(self, state: Any) -> Any:
        return super().answer(state)


@dataclass
class Settings:
    llm: Any = field(default_factory=ToolModel)
    name: str = "x"


desk, settings = Desk(model), Settings()


def reply(made: Any) -> Any:
    return {"messages": [made]}


def module_attribute(state: Any) -> Any:
    return reply(toolbox.model.invoke(state["messages"]))


def module_of_a_module(state: Any) -> Any:
    return reply(toolbox.inner.MODELS["fast"].invoke(state["messages"]))


def factory_in_a_module(state: Any) -> Any:
    return reply(toolbox.make_model().invoke(state["messages"]))


def class_attribute(state: Any) -> Any:
    return reply(desk.shared.invoke(state["messages"]))


def property_of_an_object(state: Any) -> Any:
    return reply(desk.by_property.invoke(state["messages"]))


def cached_property_of_an_object(state: Any) -> Any:
    return reply(desk.by_cached_property.invoke(state["messages"]))


def lazy_property(state: Any) -> Any:
    return reply(desk.lazy.invoke(state["messages"]))


def static_method(state: Any) -> Any:
    return reply(Desk.ask_statically(state["messages"]))


def class_method(state: Any) -> Any:
    return reply(Desk.ask_as_class(state["messages"]))


def object_made_in_the_node(state: Any) -> Any:
    return reply(Desk().ask(state["messages"]))


def model_given_to_an_object_made_in_the_node(state: Any) -> Any:
    return Desk(model).work(state)


def local_import(state: Any) -> Any:
    from tests.apps import model as imported

    return reply(imported.invoke(state["messages"]))


def local_import_of_a_class(state: Any) -> Any:
    from tests.graph.own_models import ToolModel as Model

    return reply(Model().invoke(state["messages"]))


def local_import_of_a_module(state: Any) -> Any:
    import tests.apps

    return reply(tests.apps.model.invoke(state["messages"]))


def configurable_model(state: Any) -> Any:
    asked = configurable.with_config({"configurable": {"model": "gpt"}})
    return reply(asked.invoke(state["messages"]))


def init_in_the_node(state: Any) -> Any:
    return reply(init_chat_model("openai:gpt-4o").invoke(state["messages"]))


@functools.lru_cache
def cached_factory() -> Any:
    return ToolModel()


def cached(state: Any) -> Any:
    return reply(cached_factory().invoke(state["messages"]))


def chosen_factory(state: Any) -> Any:
    makers = {"a": ToolModel, "b": cached_factory}
    return reply(makers[state["messages"][0].text]().invoke(state["messages"]))


def late_global(state: Any) -> Any:
    global _late
    if _late is None:
        _late = ToolModel()
    return reply(_late.invoke(state["messages"]))


def ten_deep(state: Any) -> Any:
    found = DEEP
    while "llm" not in found:
        found = found["inner"]
    return reply(found["llm"].invoke(state["messages"]))


DEEP: dict[str, Any] = {"llm": model}
for _ in range(10):
    DEEP = {"inner": DEEP}


def helper_of_helper(state: Any) -> Any:
    return reply(_first(state["messages"]))


def _first(messages: Any) -> Any:
    return _second(messages)


def _second(messages: Any) -> Any:
    return next(_third for _ in range(1))(messages)


def _third(messages: Any) -> Any:
    return getattr(desk, "shared").invoke(messages)  # noqa: B009


def in_a_thread(state: Any) -> Any:
    with ThreadPoolExecutor() as pool:
        return reply(pool.submit(model.invoke, state["messages"]).result())


pool_of_module = ThreadPoolExecutor(1)


def in_a_pool_made_at_import(state: Any) -> Any:
    (answer,) = pool_of_module.map(model.invoke, [state["messages"]])
    return reply(answer)


async def gathered(state: Any) -> Any:
    return reply((await asyncio.gather(model.ainvoke(state["messages"])))[0])


def chain_in_the_node(state: Any) -> Any:
    asked = ChatPromptTemplate.from_messages([("user", "{q}")]) | model | StrOutputParser()
    return reply(("ai", asked.invoke({"q": "?"})))


def parallel_chain(state: Any) -> Any:
    return reply(("ai", str(RunnableParallel(a=model, b=RunnableLambda(len)).invoke("?"))))


@chain
def decorated_chain(messages: Any) -> Any:
    return model.invoke(messages)


def through_a_chain(state: Any) -> Any:
    return reply(decorated_chain.invoke(state["messages"]))


def retried(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def again(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return again


@retried
def decorated(state: Any) -> Any:
    return reply(model.invoke(state["messages"]))


@contextlib.contextmanager
def opened() -> Iterator[Any]:
    yield ToolModel()


def context_manager(state: Any) -> Any:
    with opened() as asked:
        return reply(asked.invoke(state["messages"]))


def bound_method(state: Any) -> Any:
    ask = model.bind_tools([]).invoke
    return reply(ask(state["messages"]))


def default_of_a_parameter(state: Any, llm: Any = model) -> Any:
    return reply(llm.invoke(state["messages"]))


def context_variable(state: Any) -> Any:
    return reply(current.get().invoke(state["messages"]))


def settings_object(state: Any) -> Any:
    return reply(settings.llm.invoke(state["messages"]))


def made_settings(state: Any) -> Any:
    return reply(Settings(llm=model).llm.invoke(state["messages"]))


def mapped(state: Any) -> Any:
    return reply(next(map(model.invoke, [state["messages"]])))


def agent_made_in_the_node(state: Any) -> Any:
    return create_agent("openai:gpt-4o", []).invoke(state)


def nested_function(state: Any) -> Any:
    def ask(messages: Any) -> Any:
        return model.invoke(messages)

    return reply(ask(state["messages"]))


def from_globals(state: Any) -> Any:
    return reply(globals()["model"].invoke(state["messages"]))


def returns_a_chain(state: Any) -> Any:
    return RunnableLambda(lambda s: s["messages"]) | model | reply


@tool
def expert(question: str) -> str:
    """Ask an expert."""
    return str(model.invoke(question).text)


AGENTS: dict[str, Any] = {
    function.__name__: function
    for function in (
        *(module_attribute, module_of_a_module, factory_in_a_module, class_attribute),
        *(property_of_an_object, cached_property_of_an_object, lazy_property, static_method),
        *(class_method, object_made_in_the_node, model_given_to_an_object_made_in_the_node),
        *(local_import, local_import_of_a_class, local_import_of_a_module, configurable_model),
        *(init_in_the_node, cached, chosen_factory, late_global, ten_deep, helper_of_helper),
        *(
            in_a_thread,
            in_a_pool_made_at_import,
            gathered,
            chain_in_the_node,
            parallel_chain,
            through_a_chain,
            decorated,
        ),
        *(context_manager, bound_method, default_of_a_parameter, context_variable),
        *(settings_object, made_settings, mapped, agent_made_in_the_node, nested_function),
        *(from_globals, returns_a_chain),
    )
} | {
    "partial": functools.partial(default_of_a_parameter, llm=model),
    "super": Derived().run,
    "method": desk.work,
    "lambda": lambda state: {"messages": [desk.ask(state["messages"])]},
}


def model_in_the_config(state: Any, config: RunnableConfig) -> Any:
    return reply(config["configurable"]["llm"].invoke(state["messages"]))


def model_in_the_context(state: Any, runtime: Any) -> Any:
    return reply(runtime.context.llm.invoke(state["messages"]))


def model_in_the_state(state: Any) -> Any:
    return reply(state["llm"].invoke(state["messages"]))


def function_in_the_config(state: Any, config: RunnableConfig) -> Any:
    return reply(config.get("configurable", {}).get("ask")(state["messages"]))


def name_that_is_computed(state: Any) -> Any:
    return reply(getattr(settings, state["messages"][0].text).invoke(state["messages"]))


def evaluated(state: Any) -> Any:
    return reply(eval("model").invoke(state["messages"]))


def filled_later(state: Any) -> Any:
    return reply(Later.llm.invoke(state["messages"]))


class Later:
    llm: Any = None


CHAIN: list[Any] = []
for _ in range(3000):
    CHAIN = [CHAIN]


def deeper_than_is_looked_at(state: Any) -> Any:
    return reply(str(sorted([CHAIN], key=len)))


UNCERTAIN: dict[str, Any] = {
    function.__name__: function
    for function in (
        *(model_in_the_config, model_in_the_context, model_in_the_state, function_in_the_config),
        *(evaluated, filled_later, deeper_than_is_looked_at),
    )
}


def counts_words(state: Any) -> Any:
    words = " ".join(m.text for m in state["messages"]).lower().split()
    return reply(("ai", str(len(set(words)))))


def uses_the_standard_library(state: Any) -> Any:
    import datetime
    import json
    import re

    now = datetime.datetime.now().isoformat()
    found = re.findall(r"\d+", state["messages"][-1].text)
    return reply(("ai", json.dumps({"now": now, "found": found})))


def names_a_model_only(state: Any) -> Any:
    return reply(("ai", type(model).__name__ if isinstance(model, ToolModel) else ""))


def writes_to_the_stream(state: Any, writer: Any) -> Any:
    writer({"step": 1})
    return {}


def helper_without_a_model(state: Any) -> Any:
    def short(text: str) -> str:
        return text[:3].strip()

    return reply(("ai", short(state["messages"][-1].text)))


def keeps_in_the_store(state: Any, store: Any) -> Any:
    store.put(("a",), "key", {"n": len(state["messages"])})
    return reply(("ai", str([item.value for item in store.search(("a",))])))


NONE: dict[str, Any] = {
    function.__name__: function
    for function in (
        *(counts_words, uses_the_standard_library, names_a_model_only, writes_to_the_stream),
        *(helper_without_a_model, keeps_in_the_store),
    )
} | {"other_method_of_an_object_with_a_model": desk.look_up}
