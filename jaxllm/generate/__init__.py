"""`jaxllm generate CHECKPOINT`: continue a prompt, chat in the terminal, or continue a file of prompts in batches.

writer.py    the flags, and the model made ready: prompts in, texts out
command.py   the words of the command; one prompt; a chat
files.py     a file of prompts, through interruptions
proxy.py     two small models beside the large one (proxy-tuning): flags, checks, loading, what the expert reads
trace.py     what they changed in a text, token by token
timing.py    how long one step takes for given shapes
"""

from jaxllm.generate.command import main, run_chat, run_prompt
from jaxllm.generate.files import read_requests, run_file
from jaxllm.generate.writer import GenerateConfig, Text, Writer, prepare

__all__ = ["GenerateConfig", "Text", "Writer", "main", "prepare", "read_requests", "run_chat", "run_file", "run_prompt"]
