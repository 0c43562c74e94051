from tests.scripted_llm import ScriptedLLM, say
from tests.server import Server


def test_smoke(server: Server, llm: ScriptedLLM) -> None:
    llm.script(say("Hello there, friend"))
    frames = server.say("s1", "write me some code")
    assert server.history("s1") == [("user", "write me some code"), ("assistant", "Hello there, friend")]
    assert [f.type for f in frames][:2] == ["turn_started", "agent_switched"]
