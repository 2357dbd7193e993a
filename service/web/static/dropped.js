// What a person drops or chooses → pictures with the folders that they lay in.

const PICTURE = /\.(jpe?g|jfif|png|webp|hei[cf]|avif|bmp|gif|tiff?)$/i;
const ARCHIVE = /\.(zip|tar|tgz|tar\.gz)$/i;
const HIDDEN = /(^|\/)(\.|__MACOSX\/|Thumbs\.db$)/;
const SPLITS = new Set(["train", "training", "val", "valid", "validation", "test", "testing"]);

export function isArchive(file) {
  return ARCHIVE.test(file.name);
}

export function isPicture(file) {
  return file.type.startsWith("image/") || PICTURE.test(file.name);
}

/** Return `{path, file}` of everything that was dropped, folders included. */
export async function filesOfDrop(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => ({ path: file.name, file }));
  const found = [];
  for (const entry of entries) await walk(entry, found);
  return found;
}

/** Return `{path, file}` of what a file input holds. */
export function filesOfInput(input) {
  return [...input.files].map((file) => ({ path: file.webkitRelativePath || file.name, file }));
}

async function walk(entry, found) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    found.push({ path: entry.fullPath.replace(/^\//, ""), file });
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // 100 at a time
    if (!some.length) return;
    for (const one of some) await walk(one, found);
  }
}

/** Sort files into archives, pictures by class, and what is neither.
 *
 * The class of a picture is the folder that it lies in. Where folders called train, val or test hold the class folders, the paths
 * are kept as they are (`layout`), because there classes cannot be changed one by one.
 */
export function sortOut(files, looseName) {
  const archives = files.filter(({ file }) => isArchive(file)).map(({ file }) => file);
  const pictures = files.filter(({ path, file }) => isPicture(file) && !HIDDEN.test(path));
  const skipped = files.length - archives.length - pictures.length;
  const folders = pictures.map(({ path }) => path.split("/").slice(0, -1));
  const splitAt = folders.some((parts) => parts.some((part, at) => SPLITS.has(part.toLowerCase()) && at < parts.length - 1));
  if (splitAt) {
    const depth = Math.min(...folders.map((parts) => parts.findIndex((part) => SPLITS.has(part.toLowerCase()))).filter((at) => at >= 0));
    const layout = pictures.map(({ path, file }) => ({ path: path.split("/").slice(depth).join("/"), file }));
    return { archives, layout, classes: new Map(), skipped };
  }
  const classes = new Map();
  pictures.forEach(({ file }, at) => {
    const name = folders[at].at(-1) ?? looseName;
    classes.set(name, [...(classes.get(name) ?? []), file]);
  });
  return { archives, layout: [], classes, skipped };
}

/** Return the paths that an archive of these classes has; files of the same name get a number. */
export function entriesOf(classes) {
  const taken = new Set();
  const entries = [];
  for (const [label, files] of classes) {
    for (const file of files) {
      const safe = label.trim().replaceAll("/", "-");
      let path = `${safe}/${file.name}`;
      for (let number = 2; taken.has(path.toLowerCase()); number += 1) path = `${safe}/${number}-${file.name}`;
      taken.add(path.toLowerCase());
      entries.push({ path, file });
    }
  }
  return entries;
}
