// What the pack's nodes have in common in the page.

/** Calls `then` with the same values after the method `name` of `object`. */
export function after(object, name, then) {
  const method = object[name];
  object[name] = function (...values) {
    const result = method?.apply(this, values);
    then(...values);
    return result;
  };
}

/** Puts `element` on the node, at least `height` pixels high; neither the prompt nor the saved workflow knows of it. */
export function addBox(node, name, element, height) {
  const options = { serialize: false, hideOnZoom: false, getMinHeight: () => height };
  node.addDOMWidget(name, name, element, options).serialize = false;
}
