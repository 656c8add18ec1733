// What is shown stays up to date: polling while the page is visible.

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

/** A function that draws what has a version, if it has changed and is no older than what was drawn last. */
export function newest(draw) {
  let drawn = { version: 0 };
  return (item) => {
    if (item.version < drawn.version || JSON.stringify(item) === JSON.stringify(drawn)) return;
    drawn = item;
    draw(item);
  };
}
