// The recorded events of an answer, and what they show. Every event tells which positions changed:
//   {t: seconds since the question, f: forward, tokens: [[position, text, masked, confidence, accepted], ...]}
// and in speculative decoding, which drafts wait behind the last token, and which this step has refused there:
//   {..., drafts: [text, ...], refused: [text, ...], counts: [drafted, accepted]}

/** The cells after the first `count` events of an answer: what each position shows. */
function cellsAfter(data, count) {
  const cells = [];
  for (let i = 0; i < count; i++) {
    const event = data.events[i];
    for (const [at, text, masked, confidence, accepted] of event.tokens)
      cells[at] = masked ? { masked } : { text, confidence, accepted, forward: event.f, fresh: i === count - 1 };
  }
  if (!count && data.events.length) cells.length = data.events[0].tokens.length;
  for (let i = 0; i < cells.length; i++) cells[i] ??= { masked: true };
  if (data.serial) cells.length = Math.min(cells.length, cells.findIndex((c) => c.masked) + 1 || Infinity); // and a cursor
  if (data.done && count === data.events.length) return cells.slice(0, data.tokens ?? cells.length).filter((c) => !c.masked);
  if (data.speculative && count) addDrafts(cells, data.events[count - 1]);
  return cells;
}

/** Behind what is known: what the last event refused, then the drafts that wait, in place of the cursor. */
function addDrafts(cells, { drafts, refused, f }) {
  const cursor = cells.at(-1)?.masked ? cells.pop() : null;
  cells.push(...refused.map((text) => ({ text, draft: "refused", forward: f })));
  cells.push(...drafts.map((text) => ({ text, draft: "draft", forward: f })));
  if (cursor && !drafts.length) cells.push(cursor);
}

const countAt = (data, time) => {
  let count = 0;
  while (count < data.events.length && data.events[count].t <= time) count++;
  return count;
};
