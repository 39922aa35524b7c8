"""``launch.sh serve CKPT``: an OpenAI-compatible server, built on ``transformers serve``.

From transformers come the continuous batching (``model.init_continuous_batching``) and the shape of
the responses (``transformers.cli.serving``). Its app is not used as it is, because in 5.23 it

- downloads and loads whatever model a request names, and offers to unload ours (``/load_model``,
  ``/reset``);
- batches continuously with the temperature of the first request for all, without stop strings, and
  does not forget cancelled requests;
- serves one request at a time where the cache is not a paged one;
- takes its requests as bare dictionaries, so that bad values end as status 500 and the OpenAPI
  description is empty;
- has no key, no limits and no metrics.

The path of a request: guard.py (key, limits) → app.py (routes, errors) → requests.py (what a
request may hold) → handlers.py (prompt, response) → answer.py (text) → engines.py (tokens).

Nothing is imported here, so that ``--help`` need not wait for torch.
"""
