// A real OpenID Connect provider (oidc-provider, which is certified) for the tests of signing in. tests/oidc.py starts it.
// ACCOUNTS is a file that the tests rewrite: login → {groups, elsewhere}. `elsewhere`: the groups are only in userinfo.

import { readFileSync } from "node:fs";

const { default: Provider } = await import(process.env.MODULE);
const account = (login) => JSON.parse(readFileSync(process.env.ACCOUNTS, "utf8"))[login];
const everything = "openid profile email groups offline_access";

const provider = new Provider(process.env.ISSUER, {
  jwks: { keys: [JSON.parse(process.env.KEY)] },
  cookies: { keys: ["for the tests"] },
  clients: [
    { client_id: "page", client_secret: "page-secret", redirect_uris: [process.env.REDIRECT], grant_types: ["authorization_code", "refresh_token"], scope: everything },
    { client_id: "cli", token_endpoint_auth_method: "none", application_type: "native", redirect_uris: [], response_types: [], grant_types: ["urn:ietf:params:oauth:grant-type:device_code", "refresh_token"], scope: everything },
    { client_id: "robot", client_secret: "robot-secret", redirect_uris: [], response_types: [], grant_types: ["client_credentials"] },
  ],
  findAccount: async (_context, login) => account(login) && {
    accountId: login,
    claims: async (use) => ({
      sub: login, name: `${login} of the tests`, email: `${login}@example.com`, email_verified: true,
      ...(account(login).elsewhere && use === "id_token" ? {} : { groups: account(login).groups }),
    }),
  },
  claims: { openid: ["sub"], profile: ["name"], email: ["email", "email_verified"], groups: ["groups"] },
  conformIdTokenClaims: false,
  pkce: { required: () => true },
  rotateRefreshToken: true,
  extraTokenClaims: async (_context, token) => (token.kind === "ClientCredentials" ? { sub: "robot", groups: ["robots"] } : undefined),
  features: {
    deviceFlow: { enabled: true },
    clientCredentials: { enabled: true },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (_context, audience) => ({ scope: "", audience, accessTokenFormat: "jwt" }),
    },
  },
  ttl: { AccessToken: 3600, IdToken: 3600, RefreshToken: 86400, Grant: 86400, Session: 86400, Interaction: 600, DeviceCode: 600, ClientCredentials: 600 },
});
provider.listen(Number(new URL(process.env.ISSUER).port), "127.0.0.1");
