"""Asks a memory of `lightning serve` through LangChain: whole, in pieces, and as a part of a chain.

    pip install langchain-openai
    python langchain_chat.py http://127.0.0.1:8000 shelf "Who is the captain?"

The key, where the server has one, is read from OPENAI_API_KEY.
"""

import os
import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI


def main() -> None:
    """Prints the answer three times; they are the same, since it is greedy."""
    address, memory, question = sys.argv[1:]
    chat = ChatOpenAI(
        model=memory,
        base_url=f"{address}/v1",
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
        temperature=0,
        max_tokens=40,
    )
    print(chat.invoke(question).text)
    print("".join(piece.text for piece in chat.stream(question)))
    chain = ChatPromptTemplate.from_messages([("user", "{question}")]) | chat | StrOutputParser()
    print(chain.invoke({"question": question}))


if __name__ == "__main__":
    main()
