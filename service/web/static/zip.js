// Pack files into a zip without compressing them: photographs are compressed already. Nothing is copied into memory but the
// headers; the browser reads the files when it sends the archive.

const TABLE = new Uint32Array(256).map((_, start) => {
  let value = start;
  for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value >>> 0;
});
const MOST_BYTES = 0xffffffff; // without zip64
const MOST_FILES = 0xffff;
const UTF8_NAMES = 1 << 11;
const JANUARY_1980 = 0x21; // the earliest date a zip can hold: equal files give equal archives

export class TooLarge extends Error {}

function crc32(crc, bytes) {
  let value = ~crc;
  for (let at = 0; at < bytes.length; at += 1) value = TABLE[(value ^ bytes[at]) & 0xff] ^ (value >>> 8);
  return ~value >>> 0;
}

/** Return the CRC-32 of a file. */
export async function checksum(file) {
  let crc = 0;
  const reader = file.stream().getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return crc;
    crc = crc32(crc, value);
  }
}

function header(signature, size, fields) {
  const view = new DataView(new ArrayBuffer(size));
  view.setUint32(0, signature, true);
  for (const [at, bytes, value] of fields) (bytes === 2 ? view.setUint16(at, value, true) : view.setUint32(at, value, true));
  return view.buffer;
}

/** Return a zip of `{path, file}` entries as a Blob, and a number that it has in common with equal ones alone: `{archive, mark}`.
 * @param {(share: number) => void} onprogress
 */
export async function pack(entries, { onprogress = () => {}, signal } = {}) {
  const total = entries.reduce((sum, { file }) => sum + file.size, 0);
  if (total > MOST_BYTES || entries.length > MOST_FILES) throw new TooLarge();
  const parts = [];
  const directory = [];
  let offset = 0;
  let read = 0;
  for (const { path, file } of entries) {
    signal?.throwIfAborted();
    const name = new TextEncoder().encode(path);
    const crc = await checksum(file);
    const common = (at) => [
      [at, 2, 20], [at + 2, 2, UTF8_NAMES], [at + 8, 2, JANUARY_1980], [at + 10, 4, crc], [at + 14, 4, file.size],
      [at + 18, 4, file.size], [at + 22, 2, name.length],
    ];
    parts.push(header(0x04034b50, 30, common(4)), name, file);
    directory.push(header(0x02014b50, 46, [[4, 2, 20], ...common(6), [42, 4, offset]]), name);
    offset += 30 + name.length + file.size;
    read += file.size;
    onprogress(read / Math.max(1, total));
  }
  const size = directory.reduce((sum, part) => sum + part.byteLength, 0);
  const end = [[8, 2, entries.length], [10, 2, entries.length], [12, 4, size], [16, 4, offset]];
  const archive = new Blob([...parts, ...directory, header(0x06054b50, 22, end)], { type: "application/zip" });
  return { archive, mark: await checksum(new Blob(directory)) }; // the directory holds the name and the checksum of every file
}
