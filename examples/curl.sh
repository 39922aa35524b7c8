#!/usr/bin/env bash
# Talk to a server of ./launch.sh serve with curl. OPENAI_BASE_URL and OPENAI_API_KEY as in
# chat_client.py; MODEL is the model's id, by default the name of the folder that is served.
set -euo pipefail

URL="${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}"
MODEL="${MODEL:-sft}"

ask() { # ask PATH [JSON]: GET, or POST the JSON
  curl --silent --show-error --fail-with-body --no-buffer "$URL/$1" \
    -H "Authorization: Bearer ${OPENAI_API_KEY:-none}" \
    -H "Content-Type: application/json" ${2:+--data "$2"}
  echo
}

echo "--- the models of the server"
ask models

echo "--- a chat"
ask chat/completions '{
  "model": "'"$MODEL"'",
  "messages": [{"role": "user", "content": "春天有什么花？"}],
  "max_tokens": 50
}'

echo "--- text that goes on from a beginning, as a stream of events"
ask completions '{
  "model": "'"$MODEL"'", "prompt": "从前", "max_tokens": 20, "temperature": 0, "stream": true
}'

echo "--- is it well, and what did it do?"
curl --silent --fail "${URL%/v1}/health"
echo
ask ../metrics | grep '^mini_llm_generated_tokens_total'
