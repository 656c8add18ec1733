// Polling while the page is visible.

/** Call `load` now and then every `seconds`, except while the page is hidden. Errors go to `failed`; polling goes on. */
export function poll(signal, seconds, load, failed) {
  let timer;
  const turn = async () => {
    clearTimeout(timer);
    if (signal.aborted) return;
    if (!document.hidden) {
      try {
        await load();
      } catch (error) {
        if (signal.aborted) return;
        failed(error);
      }
    }
    if (!signal.aborted) timer = setTimeout(turn, seconds * 1000);
  };
  document.addEventListener("visibilitychange", () => !document.hidden && turn(), { signal });
  signal.addEventListener("abort", () => clearTimeout(timer));
  return turn();
}
