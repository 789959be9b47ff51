// Prompts in the browser: a byte-pair tokenizer as tokenizer.json has it, and the text encoder behind it. The page and
// Node share this module. It reads what skipstep.bench.quality.train_pictograms writes.

const SPACES = /\p{White_Space}+/gu, PIECES = /\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;

// Each byte as a character that can be seen: itself where it can, else one from 256 on.
const BYTES = (() => {
  const seen = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(seen(byte) ? byte : next++));
})();

export class Tokenizer {
  // `length` tokens a prompt, start and end among them; `pad` fills it up.
  constructor({ model, added_tokens, post_processor }, { length, pad }) {
    const pair = (merge) => (Array.isArray(merge) ? merge.join(" ") : merge);
    Object.assign(this, { vocabulary: model.vocab, length, pad });
    this.special = new Map(added_tokens.map(({ content, id }) => [content, id]));
    this.ranks = new Map(model.merges.map((merge, rank) => [pair(merge), rank]));
    this.unknown = model.vocab[model.unk_token];
    this.suffix = model.end_of_word_suffix;
    [this.start, this.end] = [post_processor.cls[1], post_processor.sep[1]];
    this.names = new RegExp(`(${added_tokens.map(({ content }) => content.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`);
  }

  // Ids of a prompt, and how many of its tokens are cut off.
  encode(prompt) {
    const ids = prompt.split(this.names).flatMap((part) => this.special.get(part) ?? this.words(part).flatMap((word) => this.merged(word)));
    const room = this.length - 2, kept = [this.start, ...ids.slice(0, room), this.end];
    return { ids: [...kept, ...Array(this.length - kept.length).fill(this.pad)], cut: Math.max(0, ids.length - room) };
  }

  // Letter by letter: a final sigma is a sigma.
  words(text) {
    const plain = Array.from(text.normalize("NFC").replace(SPACES, " "), (letter) => letter.toLowerCase()).join("");
    return plain.match(PIECES) ?? [];
  }

  merged(word) {
    const units = Array.from(new TextEncoder().encode(word), (byte) => BYTES[byte]);
    units.push(units.pop() + this.suffix);
    const known = units.map((unit) => (unit in this.vocabulary ? unit : ""));
    for (;;) {
      const ranks = known.slice(1).map((unit, i) => this.ranks.get(`${known[i]} ${unit}`) ?? Infinity);
      const best = Math.min(...ranks), place = ranks.indexOf(best);
      if (!(best < Infinity)) return known.map((unit) => this.vocabulary[unit] ?? this.unknown);
      known.splice(place, 2, known[place] + known[place + 1]);
    }
  }
}

export class Prompts {
  constructor(ort, tokenizer, session) {
    Object.assign(this, { ort, tokenizer, session });
  }

  static async open(ort, contents, graph, about) {
    const session = await ort.InferenceSession.create(graph, { executionProviders: ["wasm"], logSeverityLevel: 3 });
    return new Prompts(ort, new Tokenizer(contents, about), session);
  }

  // What the loop reads of a prompt, and of the empty one for guidance; and how many tokens are cut off.
  async read(prompt) {
    const { ort } = this, [{ ids, cut }, empty] = [prompt, ""].map((text) => this.tokenizer.encode(text));
    const tokens = new ort.Tensor("int64", BigInt64Array.from([...ids, ...empty.ids], BigInt), [2, ids.length]);
    const { embeds } = await this.session.run({ tokens }), [, ...dims] = embeds.dims, half = embeds.data.length / 2;
    const row = (i) => new ort.Tensor("float32", embeds.data.slice(i * half, (i + 1) * half), [1, ...dims]);
    return { conditions: { encoder_hidden_states: row(0), negative_encoder_hidden_states: row(1) }, cut };
  }
}
