/** The REST API: JSON in, JSON out, errors as one line. */

export class ApiError extends Error {
  /** @param {number} status 0: no answer at all. @param {string} code @param {string} message */
  constructor(status, code, message) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
  }
}

export class Api {
  /** @param {() => void} unauthorized called whenever an answer is 401 */
  constructor(unauthorized = () => {}) {
    this.unauthorized = unauthorized;
  }

  /** @param {string} path @param {Record<string, any>} params @param {AbortSignal} [signal] */
  get(path, params = {}, signal = undefined) {
    return this.#ask(address(path, params), { signal });
  }

  /** @param {string} path @param {object} body */
  post(path, body) {
    const headers = { "Content-Type": "application/json", "X-Tapeline": "1" };
    return this.#ask(address(path, {}), { method: "POST", headers, body: JSON.stringify(body) });
  }

  async #ask(url, options) {
    let answer;
    try {
      answer = await fetch(url, { credentials: "same-origin", cache: "no-store", ...options });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "unreachable", "The server does not answer.");
    }
    const found = await answer.json().catch((error) => {
      if (error.name === "AbortError") throw error;
      return null;
    });
    if (answer.ok && found !== null) return found;
    if (answer.status === 401) this.unauthorized();
    const { code = "failed", message = `The server answered ${answer.status}.` } = found?.error ?? {};
    throw new ApiError(answer.status, code, message);
  }
}

function address(path, params) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) {
    if (value !== null && value !== undefined && value !== "") query.set(name, String(value));
  }
  const full = path.startsWith("/api/") || path === "/health" ? path : `/api/v1${path}`;
  return query.size ? `${full}?${query}` : full;
}
