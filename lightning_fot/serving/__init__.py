"""Named memories over HTTP: OpenAI's interface, many answers at once, documents, and a page to try it on."""
