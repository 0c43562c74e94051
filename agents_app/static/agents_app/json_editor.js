// Turns every textarea with data-json-editor into an editor. The textarea stays the field's value, kept up to date with
// each change, and is all there is where this does not run. data-json-schema is the id of a json_script with a schema;
// what does not fit it is marked, never prevented: the server has the last word.
import { JSONEditor, createAjvValidator } from "../django_svelte_jsoneditor/js/svelte_jsoneditor.js";

function validatorFor(textarea) {
  const source = document.getElementById(textarea.dataset.jsonSchema ?? "");
  if (!source) return null;
  // The bundled checker knows no other dialect by name; the keywords that tools use are the same.
  const { $schema, ...schema } = JSON.parse(source.textContent);
  const validate = createAjvValidator({ schema, ajvOptions: { strict: false } });
  return (json) => {
    try {
      return validate(json);
    } catch {
      return [];
    }
  };
}

function note(textarea, text) {
  const said = document.createElement("p");
  said.className = "json-editor-note";
  said.textContent = text;
  textarea.before(said);
}

function edit(textarea) {
  let validator = null;
  try {
    validator = validatorFor(textarea);
  } catch {
    note(textarea, "The schema cannot be used here; what does not fit it is told when you save.");
  }
  const target = document.createElement("div");
  target.className = "json-editor";
  target.style.height = `${textarea.rows * 1.75}rem`;
  textarea.before(target);
  new JSONEditor({
    target,
    props: {
      content: { text: textarea.value },
      mode: "text",
      askToFormat: false,
      validator,
      readOnly: textarea.readOnly || textarea.disabled,
      onChange: (content) => {
        // Not `content.json || content.text`: null, 0 and false are JSON too.
        textarea.value = content.json === undefined ? content.text : JSON.stringify(content.json, null, 2);
        textarea.dispatchEvent(new Event("input", { bubbles: true }));
      },
    },
  });
  textarea.hidden = true;
}

document.querySelectorAll("textarea[data-json-editor]").forEach(edit);
