"""The bare install is enough to import the client."""

import subprocess
import sys

BLOCKED = ("torch", "transformers", "tokenizers", "jinja2", "safetensors", "peft")
BLOCKED += ("tensafe_server", "workers", "protovalidate", "uvloop")

PROGRAM = """
import sys

BLOCKED = {blocked!r}


class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{{name}} is blocked")


sys.meta_path.insert(0, Wall())
import tensafe_client, tensafe_client.data, tensafe_client.aio, tg_tinker
import tensafe_client.data.chat

assert tg_tinker.ServiceClient is tensafe_client.ServiceClient
assert set(tg_tinker.__all__) == set(tensafe_client.__all__)
assert all(hasattr(tg_tinker, name) for name in tg_tinker.__all__)
assert not set(BLOCKED) & {{name.partition(".")[0] for name in sys.modules}}
assert "tensafe-io" not in [t.name for t in __import__("threading").enumerate()]
{more}
"""


def run(more: str = "") -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(blocked=BLOCKED, more=more)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )


def test_imports_with_everything_optional_blocked() -> None:
    done = run()
    assert done.returncode == 0, done.stderr


def test_a_missing_extra_is_named() -> None:
    done = run("tensafe_client.data.chat.ChatTokenizer({})")
    assert done.returncode != 0
    assert "tensafe[data]" in done.stderr
