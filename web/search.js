// Finds the pack's nodes by the words that people type. Older front ends look at names alone, and only at their first 30
// letters; newer ones know the words, but put what they find by them behind every name that merely resembles them.
// Here our nodes that have the typed word come second, behind what the front end itself puts first. Nothing is left out.

import { app } from "../../scripts/app.js";

const simple = (text) => text.toLowerCase().replace(/[\s_-]+/g, " ").trim();

/** The words of this node, if it is one of ours: nodes/found.py sends them. */
function words(definition) {
  return definition.category?.startsWith("ZeroConv") ? definition.search_aliases ?? [] : [];
}

/** How well `query` fits: 0 for one of the words, 1 for the beginning of one, nothing else counts. */
function fit(definition, query) {
  const own = words(definition).map(simple);
  if (own.includes(query)) return 0;
  return query.length > 2 && own.some((word) => word.startsWith(query)) ? 1 : Infinity;
}

app.registerExtension({
  name: "zeroconv.search",
  setup() {
    // No public way leads there; a front end that has it elsewhere searches as it always did.
    const service = app.extensionManager?._p?._s?.get("nodeDef")?.nodeSearchService;
    if (!service?.searchNode) return;
    const kind = Object.getPrototypeOf(service); // the front end makes a new service when nodes change
    const search = kind.searchNode;
    kind.searchNode = function (query, filters, options, ...rest) {
      const found = search.call(this, query, filters, options, ...rest);
      const typed = simple(query ?? "");
      if (!typed) return found;
      const all = search.call(this, "", filters, {}, ...rest); // what the filters let through
      const fits = new Map(all.map((definition) => [definition.name, fit(definition, typed)]));
      const ours = all
        .filter(({ name }) => fits.get(name) < Infinity && name !== found[0]?.name)
        .sort((a, b) => fits.get(a.name) - fits.get(b.name));
      const names = new Set(ours.map(({ name }) => name));
      const others = found.slice(1).filter(({ name }) => !names.has(name));
      return [...found.slice(0, 1), ...ours, ...others].slice(0, options?.limit ?? Infinity);
    };
  },
});
