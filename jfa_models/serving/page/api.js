// The two calls of OpenAI's protocol that the page makes, with addresses relative to it: it may lie behind a prefix.

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function call(path, key, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const wait = response.headers.get("Retry-After");
  const message = body?.error?.message ?? `The server answered with status ${response.status}.`;
  throw new ApiError(Number(wait) ? `${message} Try again in ${wait} s.` : message, response.status);
}

/** The models and adapters that the server serves: [{id, parent, max_model_len}, ...] */
export async function models(key, signal) {
  return (await (await call("v1/models", key, { signal })).json()).data;
}

/** The response to a request for an answer, before anything of the answer has been read. */
export function complete(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  return call("v1/chat/completions", key, { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
}

/** The pieces of an answer: {content, reasoning, finish, usage}, each with what is new. */
export async function* pieces(response) {
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message);
    const choice = chunk.choices?.[0];
    yield {
      content: choice?.delta?.content ?? "",
      reasoning: choice?.delta?.reasoning_content ?? "",
      finish: choice?.finish_reason,
      usage: chunk.usage,
    };
  }
}

/** The data of server-sent events. Only complete lines are read: a chunk may end anywhere, also between \r and \n. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
      const lines = (rest + chunk.value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length) yield data.splice(0).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
