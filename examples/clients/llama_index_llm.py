"""Asks a memory of `lightning serve` through LlamaIndex: whole, with its passages, and in pieces.

    pip install llama-index-llms-openai-like
    python llama_index_llm.py http://127.0.0.1:8000 shelf "Who is the captain?"

The key, where the server has one, is read from OPENAI_API_KEY.
"""

import os
import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike


def main() -> None:
    """Prints the answer twice, which is the same, since it is greedy; then where the model looked."""
    address, memory, question = sys.argv[1:]
    llm = OpenAILike(
        model=memory,
        api_base=f"{address}/v1",
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        is_chat_model=True,
        temperature=0.0,
        max_tokens=40,
        max_retries=0,
    )
    asked = [ChatMessage(role="user", content=question)]
    whole = llm.chat(asked)
    print(whole.message.content)
    print("".join(piece.delta or "" for piece in llm.stream_chat(asked)))
    for passage in whole.raw.passages:
        print(f"{passage['document']}: {passage['share']:.1%} of the attention to the memory")


if __name__ == "__main__":
    main()
