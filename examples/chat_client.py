"""Talk to a server of ./launch.sh serve with OpenAI's Python client.

    ./launch.sh serve output/quickstart/sft
    python examples/chat_client.py "春天有什么花？"

OPENAI_BASE_URL and OPENAI_API_KEY say where the server is and what its key is, if it has one.
"""

import os
import sys

from openai import APIConnectionError, OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
question = sys.argv[1] if len(sys.argv) > 1 else "你好！"
try:
    model = client.models.list().data[0].id  # a server has one model
except APIConnectionError:
    sys.exit(
        f"error: no server answers at {client.base_url}; start one with ./launch.sh serve "
        "output/quickstart/sft, or set OPENAI_BASE_URL to where it is"
    )

# A chat, piece by piece. What a model thinks first comes as reasoning_content.
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": question}],
    max_tokens=100,
    temperature=0.7,
    stream=True,
)
print(f"{model}: ", end="")
for event in stream:
    print(event.choices[0].delta.content or "", end="", flush=True)
print()

# Text that goes on from a beginning, at once: what a base model does.
completion = client.completions.create(
    model=model, prompt="从前", max_tokens=40, temperature=0, stop=["。", "\n"]
)
print(f"从前{completion.choices[0].text}  ({completion.choices[0].finish_reason})")
