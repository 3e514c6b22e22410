// Search in pages that were opened from a folder. Browsers start no worker there, so that its script runs in a hidden
// frame; messages go both ways as they would to a worker. Pages from a server do without.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const script = new URL(url, document.baseURI);
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.srcdoc = "<!doctype html><title>search</title><body></body>";
      this.ready = new Promise((loaded) => this.frame.addEventListener("load", loaded, { once: true })).then(() => {
        const inside = this.frame.contentWindow;
        inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        inside.importScripts = async (...others) => {
          for (const other of others) await this.load(new URL(other, script));
        };
        return this.load(script);
      });
      document.body.append(this.frame);
    }

    load(url) {
      return new Promise((loaded, failed) => {
        const page = this.frame.contentDocument;
        const tag = page.createElement("script");
        tag.src = url.href;
        tag.onload = loaded;
        tag.onerror = () => failed(new Error(`${url.href} cannot be read`));
        page.body.append(tag);
      });
    }

    postMessage(data) {
      this.ready.then(() => {
        const inside = this.frame.contentWindow;
        inside.dispatchEvent(new inside.MessageEvent("message", { data }));
      });
    }

    terminate() {
      this.frame.remove();
    }
  };
}
