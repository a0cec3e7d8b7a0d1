// Lists, watches and updates a run, as a program in another language does: from the .proto files alone.
//
// Usage: node client.js PROTOS ADDRESS RUN. Prints one JSON object.

"use strict";

const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [protos, address, name] = process.argv.slice(2);
const definition = loader.loadSync("kfdist/v1/run.proto", {
  includeDirs: [protos],
  longs: Number,
  enums: String,
  defaults: true,
});
const { RunService } = grpc.loadPackageDefinition(definition).kfdist.v1;
const client = new RunService(address, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
metadata.set("kfdist-user", "node@test");

function call(method, request) {
  const deadline = Date.now() + 20000;
  return new Promise((resolve, reject) => {
    client[method](request, metadata, { deadline }, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

// Resolves with the revisions that a watch brings, up to and including `last`.
function watch(fromRevision, last) {
  const seen = [];
  const stream = client.watch({ name, fromRevision }, { deadline: Date.now() + 20000 });
  return new Promise((resolve, reject) => {
    stream.on("data", ({ run }) => {
      seen.push(run.revision);
      if (run.revision === last) {
        stream.cancel();
        resolve(seen);
      }
    });
    stream.on("error", (error) => (error.code === grpc.status.CANCELLED ? undefined : reject(error)));
  });
}

async function main() {
  const { runs } = await call("list", {});
  const before = runs.find((run) => run.name === name);
  const watching = watch(before.revision, before.revision + 2);
  const request = { name, requestId: "node-1", damping: 0.5, inversePeriod: 20 };
  const first = await call("updateSettings", request);
  const again = await call("updateSettings", request);
  await call("pause", { name, requestId: "node-2" });
  const refused = await call("updateSettings", { name, requestId: "node-3", damping: 0 }).catch((error) => error);
  const { events } = await call("listEvents", { name });
  console.log(
    JSON.stringify({
      before,
      watched: await watching,
      repeated: JSON.stringify(first) === JSON.stringify(again),
      run: first.run,
      refused: { code: refused.code, details: refused.details },
      events: events.map((event) => [event.kind, event.text]),
    }),
  );
  client.close();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
